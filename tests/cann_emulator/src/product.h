// What each product's HCCL refuses, and how ranks lie on servers. Where a rule comes from stands in the README.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

enum class Product { kA2, kA3, k950, k300I, k910A };

inline Product product_of(const std::string &soc) {
  if (soc.rfind("Ascend910B", 0) == 0) return Product::kA2;
  if (soc.rfind("Ascend910_93", 0) == 0) return Product::kA3;
  if (soc.rfind("Ascend950", 0) == 0) return Product::k950;
  if (soc.rfind("Ascend310P", 0) == 0) return Product::k300I;
  return Product::k910A;
}
inline std::string soc_name() {
  const char *s = std::getenv("CANNEMU_SOC");
  return s != nullptr && *s != '\0' ? s : "Ascend910B2";
}

// Ranks a server: "4" for every server, or "4,2" for the first, the second and so on. Without it all are on one.
inline uint32_t server_of(uint32_t rank) {
  const char *text = std::getenv("CANNEMU_SERVERS");
  if (text == nullptr || *text == '\0') return 0;
  std::vector<uint32_t> sizes;
  for (const char *at = text; *at != '\0';) {
    char *end = nullptr;
    const uint32_t size = std::strtoul(at, &end, 10);
    if (end == at || size == 0) break;
    sizes.push_back(size);
    at = *end == ',' ? end + 1 : end;
  }
  if (sizes.empty()) return 0;
  uint32_t server = 0;
  for (uint32_t size : sizes) {
    if (rank < size) return server;
    rank -= size;
    ++server;
  }
  return server + rank / sizes.back();
}

// Why a product's HCCL refuses a call, or nullptr. `ranks`: members of the communicator on each server that has any.
inline const char *refusal(Product product, const std::string &call, const std::vector<uint32_t> &ranks) {
  uint32_t members = 0;
  bool equal = true;
  for (uint32_t n : ranks) members += n, equal = equal && n == ranks[0];
  const bool one = ranks.size() == 1;
  const bool gather_v = call == "AllGatherV", to_all = call.rfind("AlltoAll", 0) == 0;
  switch (product) {
    case Product::kA2:
      return gather_v && !one && !equal ? "AllGatherV over servers with different numbers of NPUs" : nullptr;
    case Product::kA3:
    case Product::k950:
      return gather_v && !one ? "AllGatherV over several servers" : nullptr;
    case Product::k300I:
      if (!gather_v && !to_all) return nullptr;
      return !one || members > 4 ? "AllGatherV and AlltoAll over more than 4 NPUs or several servers" : nullptr;
    case Product::k910A:
      if (gather_v) return "AllGatherV";
      return to_all && members % 4 != 0 && members > 2 ? "AlltoAll by ranks that are no whole clusters of 4" : nullptr;
  }
  return nullptr;
}
