/* Preloaded into a process, this counts the file operations that change something and
   lets one of them fail, or kills the process before it. fault_arm() starts to count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, KILL, NO_SPACE_FROM, IO_ERROR_AT };
static volatile int mode = OFF;
static volatile long due, counted;

void fault_arm(int new_mode, long number) { counted = 0; due = number; mode = new_mode; }
long fault_disarm(void) { mode = OFF; return counted; }

/* Say whether the operation is to fail, with errno set. */
static int strikes(int takes_space) {
    if (mode == OFF) return 0;
    counted++;
    if (mode == KILL && counted == due) kill(getpid(), SIGKILL);
    if (mode == NO_SPACE_FROM && counted >= due && takes_space) { errno = ENOSPC; return 1; }
    if (mode == IO_ERROR_AT && counted == due) { errno = EIO; return 1; }
    return 0;
}

static int is_file(int fd) {
    struct stat info;
    return mode != OFF && fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
}

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list args; va_start(args, flags);                              \
        mode_t rights = va_arg(args, int); va_end(args);                  \
        if ((flags & O_CREAT) && strikes(1)) return -1;                   \
        return NEXT(name)(path, flags, rights);                           \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                      \
    int name(int dir, const char *path, int flags, ...) {                 \
        va_list args; va_start(args, flags);                              \
        mode_t rights = va_arg(args, int); va_end(args);                  \
        if ((flags & O_CREAT) && strikes(1)) return -1;                   \
        return NEXT(name)(dir, path, flags, rights);                      \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    if (is_file(fd) && strikes(1)) return -1;
    return NEXT(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    if (is_file(fd) && strikes(1)) return -1;
    return NEXT(writev)(fd, parts, number);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    if (is_file(fd) && strikes(1)) return -1;
    return NEXT(pwrite64)(fd, data, size, place);
}
int ftruncate64(int fd, off64_t size) { return strikes(1) ? -1 : NEXT(ftruncate64)(fd, size); }
int fsync(int fd) { return strikes(1) ? -1 : NEXT(fsync)(fd); }
int fdatasync(int fd) { return strikes(1) ? -1 : NEXT(fdatasync)(fd); }
int rename(const char *a, const char *b) { return strikes(0) ? -1 : NEXT(rename)(a, b); }
int renameat(int c, const char *a, int d, const char *b) {
    return strikes(0) ? -1 : NEXT(renameat)(c, a, d, b);
}
int mkdir(const char *path, mode_t rights) { return strikes(1) ? -1 : NEXT(mkdir)(path, rights); }
int mkdirat(int dir, const char *path, mode_t rights) {
    return strikes(1) ? -1 : NEXT(mkdirat)(dir, path, rights);
}
int unlink(const char *path) { return strikes(0) ? -1 : NEXT(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return strikes(0) ? -1 : NEXT(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) { return strikes(0) ? -1 : NEXT(rmdir)(path); }
