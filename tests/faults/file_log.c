/* Preloaded into a process, this writes down every change that the process makes to the
   files below a folder: one line for each, in the order in which they were made.
   log_start() begins it, log_mark() adds a line, log_stop() ends it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int out = -1;
static char root[PATH_MAX];

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

void log_start(const char *file, const char *folder) {
    snprintf(root, sizeof root, "%s/", folder);
    out = NEXT(open)(file, O_WRONLY | O_CREAT | O_TRUNC, 0644);
}
void log_mark(const char *what) { dprintf(out, "mark\t%s\n", what); }
void log_stop(void) { close(out); out = -1; }

/* Where a path leads, without following a link at its end. */
static const char *whole(int dir, const char *path, char *to) {
    char base[PATH_MAX] = "", link[64];
    if (path[0] == '/') return strcpy(to, path);
    snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
    if (readlink(link, base, sizeof base - 1) < 0) return strcpy(to, "");
    if (!path[0]) return strcpy(to, base);
    snprintf(to, PATH_MAX, "%s/%s", base, path);
    return to;
}
static int is_ours(const char *path) {
    return out >= 0 && strncmp(path, root, strlen(root) - 1) == 0;
}
static void note(const char *what, int dir, const char *path) {
    char to[PATH_MAX];
    if (out >= 0 && is_ours(whole(dir, path, to))) dprintf(out, "%s\t%s\n", what, to);
}
static void note_file(const char *what, int fd) { note(what, fd, ""); }

static void note_write(int fd, const void *data, ssize_t size, off_t place) {
    char to[PATH_MAX];
    if (out < 0 || size <= 0 || fd == out || !is_ours(whole(fd, "", to))) return;
    char *hex = malloc(2 * size + 1);
    for (ssize_t i = 0; i < size; i++) sprintf(hex + 2 * i, "%02x", ((unsigned char *) data)[i]);
    dprintf(out, "write\t%s\t%ld\t%s\n", to, (long) place, hex);
    free(hex);
}

#define OPENED(dir, path, flags, call)                                    \
    struct stat before;                                                   \
    int is_new = out >= 0 && fstatat(dir, path, &before, 0) != 0;         \
    int fd = call;                                                        \
    if (fd >= 0 && (flags & O_CREAT) && is_new) note_file("create", fd);  \
    else if (fd >= 0 && (flags & O_TRUNC)) note_file("empty", fd);        \
    return fd;
#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list args; va_start(args, flags);                              \
        mode_t rights = va_arg(args, int); va_end(args);                  \
        OPENED(AT_FDCWD, path, flags, NEXT(name)(path, flags, rights))    \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                      \
    int name(int dir, const char *path, int flags, ...) {                 \
        va_list args; va_start(args, flags);                              \
        mode_t rights = va_arg(args, int); va_end(args);                  \
        OPENED(dir, path, flags, NEXT(name)(dir, path, flags, rights))    \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    off_t place = lseek(fd, 0, SEEK_CUR);
    ssize_t done = NEXT(write)(fd, data, size);
    note_write(fd, data, done, place);
    return done;
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    off_t place = lseek(fd, 0, SEEK_CUR);
    ssize_t done = NEXT(writev)(fd, parts, number), left = done;
    for (int i = 0; i < number && left > 0; i++) {
        ssize_t size = left < (ssize_t) parts[i].iov_len ? left : (ssize_t) parts[i].iov_len;
        note_write(fd, parts[i].iov_base, size, place);
        place += size;
        left -= size;
    }
    return done;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    ssize_t done = NEXT(pwrite64)(fd, data, size, place);
    note_write(fd, data, done, place);
    return done;
}

int ftruncate64(int fd, off64_t size) {
    char to[PATH_MAX];
    int bad = NEXT(ftruncate64)(fd, size);
    if (!bad && is_ours(whole(fd, "", to))) dprintf(out, "resize\t%s\t%ld\n", to, (long) size);
    return bad;
}

#define NOTED(what, dir, path, call) { int bad = call; if (!bad) note(what, dir, path); return bad; }
int fsync(int fd) { int bad = NEXT(fsync)(fd); if (!bad) note_file("sync", fd); return bad; }
int fdatasync(int fd) { int bad = NEXT(fdatasync)(fd); if (!bad) note_file("sync", fd); return bad; }
int mkdir(const char *path, mode_t rights) NOTED("mkdir", AT_FDCWD, path, NEXT(mkdir)(path, rights))
int mkdirat(int dir, const char *path, mode_t rights) NOTED("mkdir", dir, path, NEXT(mkdirat)(dir, path, rights))
int unlink(const char *path) NOTED("remove", AT_FDCWD, path, NEXT(unlink)(path))
int rmdir(const char *path) NOTED("remove", AT_FDCWD, path, NEXT(rmdir)(path))
int unlinkat(int dir, const char *path, int flags) NOTED("remove", dir, path, NEXT(unlinkat)(dir, path, flags))

static void note_rename(int c, const char *a, int d, const char *b) {
    char from[PATH_MAX], to[PATH_MAX];
    if (out < 0) return;
    whole(c, a, from);
    if (is_ours(whole(d, b, to)) || is_ours(from)) dprintf(out, "rename\t%s\t%s\n", from, to);
}
int rename(const char *a, const char *b) {
    int bad = NEXT(rename)(a, b);
    if (!bad) note_rename(AT_FDCWD, a, AT_FDCWD, b);
    return bad;
}
int renameat(int c, const char *a, int d, const char *b) {
    int bad = NEXT(renameat)(c, a, d, b);
    if (!bad) note_rename(c, a, d, b);
    return bad;
}
