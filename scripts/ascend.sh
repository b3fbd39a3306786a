#!/usr/bin/env bash
# The live tests on the emulated Ascend, for every product and arrangement of servers, each call executed at once and
# streams that run ahead of the host; strict types throughout. About 25 minutes. A line per run; logs in the folder given.
#     scripts/ascend.sh [FOLDER]
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
cd "$ROOT"
logs=${1:-$(mktemp -d)}
mkdir -p "$logs"
export CANNEMU_STRICT_TYPES=1 MS_CKPT_EXT_E2E=all
four="tests/live/test_live_msrun.py::test_four_emulated_npus"
eight="tests/live/test_live_msrun.py::test_eight_emulated_npus"
sinks="tests/live/test_live_sinks.py"
# AHEAD is 0 or 1, as these tests are told it.
moved4="tests/live/test_transfer_msrun.py::test_four_emulated_npus[AHEAD]"
moved8="tests/live/test_transfer_msrun.py::test_eight_emulated_npus[AHEAD]"
peers="tests/live/test_peers_msrun.py::test_only_what_no_rank_holds_is_read[ascend-AHEAD]"
failed=0

run() { # NAME SOC SERVERS TESTS...
    local name=$1 soc=$2 servers=$3 start=$SECONDS
    shift 3
    for ahead in 0 1; do
        if CANNEMU_SOC=$soc CANNEMU_SERVERS=$servers CANNEMU_ASYNC=$ahead CANNEMU_POISON=$ahead \
            python -m pytest -q --timeout=900 "${@//AHEAD/$ahead}" >"$logs/$name-$ahead.log" 2>&1; then
            told=right
        else
            told="WRONG, see $logs/$name-$ahead.log"
            failed=1
        fi
        echo "$name, $([[ $ahead = 1 ]] && echo asynchronous with poison || echo synchronous): $told ($((SECONDS - start)) s)"
        start=$SECONDS
    done
}

run a2-one-server Ascend910B2 "" "$four" "$eight" "$sinks" "$moved4" "$moved8" "$peers"
run a2-two-equal Ascend910B2 2 "$four" "$sinks" "$moved4" "$peers"
run a2-two-unequal Ascend910B2 3,1 "$four" "$moved4"
run a3-two-servers Ascend910_9392 2 "$four" "$moved4"
run 300i-four Ascend310P3 "" "$four" "$moved4"
run 300i-eight Ascend310P3 "" "$eight" "$moved8"
# MindSpore takes all device memory of a 910A at once, and poison fills it: eight ranks of 16 GiB are too much.
HCCL_BUFFSIZE=16 CANNEMU_HBM_MB=1536 run 910a-eight Ascend910A "" "$eight" "$moved8"
exit $failed
