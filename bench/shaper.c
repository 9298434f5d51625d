/* Makes a server on loopback look like a distant object store; loaded with LD_PRELOAD into radosgw.
 *
 *   SHAPER_CONNECTION_RATE   bytes per second of each accepted connection (the kernel paces it, at no CPU)
 *   SHAPER_FIRST_BYTE_USEC   pause between a request and the first byte of its answer
 *   SHAPER_TOTAL_RATE        bytes per second of all connections together, as a node's network card allows
 *
 * Unset or 0: no such limit. The pauses block the thread that serves the connection, so this fits servers
 * with a thread per request (radosgw has 64), not event loops. It shapes what the server sends, and is no
 * round-trip time: connecting and TCP's slow start remain as quick as loopback.
 *
 *   cc -shared -fPIC -O2 -o shaper.so shaper.c -ldl -lpthread
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_DESCRIPTORS 65536
#define NANOSECONDS 1000000000LL
#define BURST (NANOSECONDS / 50) /* how far sending may run ahead of the total rate: 20 ms */

enum state { FOREIGN, ANSWERING, ASKED }; /* ASKED: a request came in, its answer has not begun */

static uint8_t states[MAX_DESCRIPTORS];
static uint64_t connection_rate, total_rate;
static int64_t first_byte_pause;
static pthread_mutex_t total_lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t total_free_at;

static int (*next_accept)(int, struct sockaddr *, socklen_t *);
static int (*next_accept4)(int, struct sockaddr *, socklen_t *, int);
static int (*next_close)(int);
static ssize_t (*next_recv)(int, void *, size_t, int);
static ssize_t (*next_recvmsg)(int, struct msghdr *, int);
static ssize_t (*next_send)(int, const void *, size_t, int);
static ssize_t (*next_sendmsg)(int, const struct msghdr *, int);

static uint64_t setting(const char *name)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : 0;
}

__attribute__((constructor)) static void prepare(void)
{
    connection_rate = setting("SHAPER_CONNECTION_RATE");
    total_rate = setting("SHAPER_TOTAL_RATE");
    first_byte_pause = (int64_t)setting("SHAPER_FIRST_BYTE_USEC") * 1000;
    next_accept = dlsym(RTLD_NEXT, "accept");
    next_accept4 = dlsym(RTLD_NEXT, "accept4");
    next_close = dlsym(RTLD_NEXT, "close");
    next_recv = dlsym(RTLD_NEXT, "recv");
    next_recvmsg = dlsym(RTLD_NEXT, "recvmsg");
    next_send = dlsym(RTLD_NEXT, "send");
    next_sendmsg = dlsym(RTLD_NEXT, "sendmsg");
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * NANOSECONDS + time.tv_nsec;
}

static void pause_for(int64_t nanoseconds)
{
    struct timespec time = {nanoseconds / NANOSECONDS, nanoseconds % NANOSECONDS};
    if (nanoseconds > 0)
        nanosleep(&time, NULL);
}

static bool shaped(int descriptor)
{
    return descriptor >= 0 && descriptor < MAX_DESCRIPTORS && states[descriptor] != FOREIGN;
}

/* Only connections that clients opened over TCP are shaped, not the server's own ones. */
static int adopt(int descriptor)
{
    int family = 0;
    socklen_t size = sizeof family;
    if (descriptor < 0 || descriptor >= MAX_DESCRIPTORS)
        return descriptor;
    getsockopt(descriptor, SOL_SOCKET, SO_DOMAIN, &family, &size);
    states[descriptor] = family == AF_INET || family == AF_INET6 ? ANSWERING : FOREIGN;
    if (states[descriptor] != FOREIGN && connection_rate)
        setsockopt(descriptor, SOL_SOCKET, SO_MAX_PACING_RATE, &connection_rate, sizeof connection_rate);
    return descriptor;
}

static ssize_t after_receive(int descriptor, ssize_t count)
{
    if (count > 0 && shaped(descriptor))
        states[descriptor] = ASKED;
    return count;
}

static void before_send(int descriptor)
{
    if (shaped(descriptor) && states[descriptor] == ASKED) {
        states[descriptor] = ANSWERING;
        pause_for(first_byte_pause);
    }
}

static ssize_t after_send(int descriptor, ssize_t count)
{
    if (!total_rate || count <= 0 || !shaped(descriptor))
        return count;
    int64_t time = now();
    pthread_mutex_lock(&total_lock);
    if (total_free_at < time)
        total_free_at = time;
    total_free_at += count * NANOSECONDS / (int64_t)total_rate;
    int64_t ahead = total_free_at - time - BURST;
    pthread_mutex_unlock(&total_lock);
    pause_for(ahead);
    return count;
}

int accept(int listener, struct sockaddr *address, socklen_t *size)
{
    return adopt(next_accept(listener, address, size));
}

int accept4(int listener, struct sockaddr *address, socklen_t *size, int flags)
{
    return adopt(next_accept4(listener, address, size, flags));
}

int close(int descriptor)
{
    if (descriptor >= 0 && descriptor < MAX_DESCRIPTORS)
        states[descriptor] = FOREIGN;
    return next_close(descriptor);
}

ssize_t recv(int descriptor, void *buffer, size_t size, int flags)
{
    return after_receive(descriptor, next_recv(descriptor, buffer, size, flags));
}

ssize_t recvmsg(int descriptor, struct msghdr *message, int flags)
{
    return after_receive(descriptor, next_recvmsg(descriptor, message, flags));
}

ssize_t send(int descriptor, const void *buffer, size_t size, int flags)
{
    before_send(descriptor);
    return after_send(descriptor, next_send(descriptor, buffer, size, flags));
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags)
{
    before_send(descriptor);
    return after_send(descriptor, next_sendmsg(descriptor, message, flags));
}
