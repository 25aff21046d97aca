/* Preloaded into a process, this moves its wall clock: clock_jump() adds seconds to it.
   The clock that counts from the start of the machine stays as it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static volatile long shift;

#define NEXT(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

void clock_jump(long seconds) { shift += seconds; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int bad = NEXT(clock_gettime)(clock, now);
    if (!bad && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift;
    return bad;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int bad = NEXT(gettimeofday)(now, zone);
    if (!bad) now->tv_sec += shift;
    return bad;
}
time_t time(time_t *to) {
    time_t now = NEXT(time)(0) + shift;
    if (to) *to = now;
    return now;
}
