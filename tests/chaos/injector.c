/* Faults of storage, memory and clocks for one process: an LD_PRELOAD library.

   Calls on files below CHAOS_SOURCE and CHAOS_TARGET are counted by class, together over all threads; all others pass.
   From the CHAOS_AT-th call of the classes in CHAOS_ON ("read@source,open@target") on, CHAOS_TIMES calls (0: all) are
   made otherwise, as CHAOS_DO says:

       errno:N     the call fails with this number
       short       a read or a write stops after half of the bytes
       delay:MS    the call begins so much later
       hold:FILE   the call waits until somebody has removed FILE, which is made for it; it names the call

   CHAOS_NFS=1 makes every file system one that copies by itself. CHAOS_CLOCK=AT:SECONDS moves the wall clock from the
   AT-th look at it on. CHAOS_COUNTS names a file that is given the counts of all classes at the end. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, STAT, LIST, READ, WRITE, COPY, RESERVE, SYNC, RENAME, UNLINK, MKDIR, CLASSES };
static const char *const NAMES[CLASSES] = {"open", "stat", "list", "read", "write", "copy",
                                           "reserve", "sync", "rename", "unlink", "mkdir"};
enum { NOWHERE = -1, SOURCE, TARGET, SIDES };
static const char *const SIDE_NAMES[SIDES] = {"source", "target"};

static const char *roots[SIDES];
static int chosen[CLASSES][SIDES];
static long at, times, clock_at, clock_by;
static enum { NOTHING, FAIL, SHORT, DELAY, HOLD } what;
static long number;
static const char *held_by, *counts;
static int as_nfs;
static atomic_long seen, looks, made[CLASSES][SIDES];

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Also for a process that was forked, and told by its environment what to do. */
__attribute__((constructor)) void chaos_begin(void) {
    const char *on = getenv("CHAOS_ON"), *doing = getenv("CHAOS_DO"), *moved = getenv("CHAOS_CLOCK");
    roots[SOURCE] = getenv("CHAOS_SOURCE");
    roots[TARGET] = getenv("CHAOS_TARGET");
    counts = getenv("CHAOS_COUNTS");
    as_nfs = getenv("CHAOS_NFS") != NULL;
    at = getenv("CHAOS_AT") ? atol(getenv("CHAOS_AT")) : 1;
    times = getenv("CHAOS_TIMES") ? atol(getenv("CHAOS_TIMES")) : 1;
    for (int c = 0; on && c < CLASSES; c++)
        for (int s = 0; s < SIDES; s++) {
            char word[32];
            snprintf(word, sizeof word, "%s@%s", NAMES[c], SIDE_NAMES[s]);
            chosen[c][s] = strstr(on, word) != NULL;
        }
    clock_by = 0;
    what = NOTHING;
    if (moved) sscanf(moved, "%ld:%ld", &clock_at, &clock_by);
    if (!doing) return;
    if (sscanf(doing, "errno:%ld", &number) == 1) what = FAIL;
    else if (sscanf(doing, "delay:%ld", &number) == 1) what = DELAY;
    else if (!strcmp(doing, "short")) what = SHORT;
    else if (!strncmp(doing, "hold:", 5)) what = HOLD, held_by = doing + 5;
}

__attribute__((destructor)) static void end(void) {
    FILE *file = counts ? fopen(counts, "w") : NULL;
    if (!file) return;
    for (int c = 0; c < CLASSES; c++)
        for (int s = 0; s < SIDES; s++) fprintf(file, "%s@%s %ld\n", NAMES[c], SIDE_NAMES[s], made[c][s]);
    fprintf(file, "clock %ld\n", (long)looks);
    fclose(file);
}

static int side_of(const char *path) {
    for (int s = 0; path && s < SIDES; s++) {
        size_t length = roots[s] ? strlen(roots[s]) : 0;
        if (length && !strncmp(path, roots[s], length) && (path[length] == '/' || !path[length])) return s;
    }
    return NOWHERE;
}

static int side_of_fd(int fd) {
    char link[40], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return NOWHERE;
    path[length] = 0;
    return side_of(path);
}

static void rest(long milliseconds) {
    struct timespec pause = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    syscall(SYS_nanosleep, &pause, NULL);
}

static void hold(int class, int side) {
    char word[64];
    long fd = syscall(SYS_openat, AT_FDCWD, held_by, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return;
    int length = snprintf(word, sizeof word, "%s@%s\n", NAMES[class], SIDE_NAMES[side]);
    syscall(SYS_write, fd, word, length);
    syscall(SYS_close, fd);
    while (!syscall(SYS_faccessat, AT_FDCWD, held_by, F_OK)) rest(2);
}

/* Whether a call fails (errno is set), and of which length it is: `*length` may be made shorter. */
static int strikes(int class, int side, size_t *length) {
    if (side == NOWHERE) return 0;
    made[class][side]++;
    if (what == NOTHING || !chosen[class][side]) return 0;
    long turn = ++seen;
    if (turn < at || (times && turn >= at + times)) return 0;
    if (what == DELAY) rest(number);
    if (what == HOLD) hold(class, side);
    if (what == SHORT && length && *length > 1) *length = *length / 2;
    if (what != FAIL) return 0;
    errno = (int)number;
    return 1;
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        return strikes(OPEN, side_of(path), NULL) ? -1 : real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = va_arg(more, mode_t); \
        va_end(more); \
        return strikes(OPEN, side_of(path), NULL) ? -1 : real(folder, path, flags, mode); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define STATS(name, type) \
    int name(const char *path, struct type *status) { \
        REAL(name); \
        return strikes(STAT, side_of(path), NULL) ? -1 : real(path, status); \
    }
STATS(stat, stat)
STATS(lstat, stat)
STATS(stat64, stat64)
STATS(lstat64, stat64)

DIR *opendir(const char *path) {
    REAL(opendir);
    return strikes(LIST, side_of(path), NULL) ? NULL : real(path);
}

ssize_t read(int fd, void *buffer, size_t length) {
    REAL(read);
    return strikes(READ, side_of_fd(fd), &length) ? -1 : real(fd, buffer, length);
}

#define READS_AT(name, type) \
    ssize_t name(int fd, void *buffer, size_t length, type offset) { \
        REAL(name); \
        return strikes(READ, side_of_fd(fd), &length) ? -1 : real(fd, buffer, length, offset); \
    }
READS_AT(pread, off_t)
READS_AT(pread64, off64_t)

/* A short one is a call for the first places, or for half of the only one. */
#define SCATTERS(name, type, single) \
    ssize_t name(int fd, const struct iovec *places, int count, type offset) { \
        REAL(name); \
        size_t wanted = count > 1 ? (size_t)count : count ? places[0].iov_len : 0, given = wanted; \
        if (strikes(READ, side_of_fd(fd), &given)) return -1; \
        if (given == wanted) return real(fd, places, count, offset); \
        return count > 1 ? real(fd, places, (int)given, offset) : single(fd, places[0].iov_base, given, offset); \
    }
static ssize_t read_at(int fd, void *buffer, size_t length, off_t offset) {
    return syscall(SYS_pread64, fd, buffer, length, offset);
}
SCATTERS(preadv, off_t, read_at)
SCATTERS(preadv64, off64_t, read_at)

/* Python's own preadv. */
#define SCATTERS_TOO(name, type) \
    ssize_t name(int fd, const struct iovec *places, int count, type offset, int flags) { \
        return flags ? (errno = EOPNOTSUPP, -1) : preadv64(fd, places, count, offset); \
    }
SCATTERS_TOO(preadv2, off_t)
SCATTERS_TOO(preadv64v2, off64_t)

ssize_t write(int fd, const void *buffer, size_t length) {
    REAL(write);
    return strikes(WRITE, side_of_fd(fd), &length) ? -1 : real(fd, buffer, length);
}

#define WRITES_AT(name, type) \
    ssize_t name(int fd, const void *buffer, size_t length, type offset) { \
        REAL(name); \
        return strikes(WRITE, side_of_fd(fd), &length) ? -1 : real(fd, buffer, length, offset); \
    }
WRITES_AT(pwrite, off_t)
WRITES_AT(pwrite64, off64_t)

ssize_t copy_file_range(int from, off64_t *source, int to, off64_t *target, size_t length, unsigned flags) {
    REAL(copy_file_range);
    return strikes(COPY, side_of_fd(to), &length) ? -1 : real(from, source, to, target, length, flags);
}

#define RESERVES(name, type) \
    int name(int fd, int mode, type offset, type length) { \
        REAL(name); \
        return strikes(RESERVE, side_of_fd(fd), NULL) ? -1 : real(fd, mode, offset, length); \
    }
RESERVES(fallocate, off_t)
RESERVES(fallocate64, off64_t)

int fsync(int fd) {
    REAL(fsync);
    return strikes(SYNC, side_of_fd(fd), NULL) ? -1 : real(fd);
}

int rename(const char *old, const char *new) {
    REAL(rename);
    return strikes(RENAME, side_of(new), NULL) ? -1 : real(old, new);
}

int unlink(const char *path) {
    REAL(unlink);
    return strikes(UNLINK, side_of(path), NULL) ? -1 : real(path);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return strikes(MKDIR, side_of(path), NULL) ? -1 : real(path, mode);
}

int fstatfs(int fd, struct statfs *status) {
    REAL(fstatfs);
    int done = real(fd, status);
    if (!done && as_nfs) status->f_type = 0x6969;
    return done;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int done = real(clock, now);
    if (!done && clock == CLOCK_REALTIME && ++looks >= clock_at) now->tv_sec += clock_by;
    return done;
}
