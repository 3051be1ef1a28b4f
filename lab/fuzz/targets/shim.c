/* The shim (cni/shim/vmtap.c) in a simulated kernel, for libFuzzer; with -DREPLAY a program that runs files.
 *
 * Input: flags; three lengths of two bytes, each followed by so many bytes: the environment (entries that end with a
 * NUL), stdin, what the agent sends; then one byte for each system call, which says how it ends. Without one it
 * succeeds at once. Time passes only in poll(2).
 *
 * Besides what the sanitizers see, it must hold that: each request and each pending file has the layout of struct head;
 * without an answer of the agent stdout gets nothing or one line of JSON, DEL succeeds, and a hook fails; an ADD whose
 * answer cannot be printed is undone; every socket and file is closed, no pending file stays half-written under its
 * final name.
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#define KEPT (1 << 16) /* bytes that a stream keeps of what is written to it */

struct slice { const uint8_t *at, *end; };
struct stream { uint8_t data[KEPT]; size_t length; int open; };

enum { CALLED_AS_MACVTAP = 1, WITHOUT_ARGV = 2, LARGE_STDIN = 4, CALLED_AS_HOOK = 8, WITH_CLAIM = 16 };
enum { NETNS = 10, NOTIFY, FILE_FD, SOCKET, CONFIG };

static struct slice outcomes, stdin_bytes, answers;
static struct stream out, messages, file, sent;
static size_t stdin_left;
static int64_t clock_ms;
static int hook, config_open, notify_open, stdin_ended, answered, tries, no_memory, undo_since, half_written, kept_pending, disk_failed;
static char verb[16];

static uint8_t outcome(void)
{
    return outcomes.at < outcomes.end ? *outcomes.at++ : 0;
}

/* Whether a call fails, with errno set. */
static int fails(int with)
{
    uint8_t how = outcome();
    errno = how & 1 ? EINTR : with;
    return how >= 0xe0;
}

/* The same for a call that changes the disk. */
static int disk_fails(int with)
{
    int failed = fails(with);
    disk_failed |= failed && errno != EEXIST;
    return failed;
}

/* How much of length a call carries out. */
static size_t part(size_t length)
{
    uint8_t how = outcome();
    return how & 1 && length > 1 ? 1 + how % (length - 1) : length;
}

static void keep(struct stream *to, const void *data, size_t length)
{
    size_t room = sizeof to->data - (to->length < sizeof to->data ? to->length : sizeof to->data);
    if (room)
        memcpy(to->data + to->length, data, length < room ? length : room);
    to->length += length;
}

/* The stream begins with a struct head; if it is whole it has the length that the head states. */
static void check_request(const struct stream *request, int whole)
{
    uint32_t head[4];
    if (request->length < sizeof head) {
        assert(!whole);
        return;
    }
    memcpy(head, request->data, sizeof head);
    assert(head[0] == 0x31746d76u && head[1] <= 2 && (head[1] == 2) == hook && head[3] <= 1u << 20);
    assert(!hook || !memcmp(request->data + sizeof head, "CNI_COMMAND=HOOK", head[2] < 16 ? head[2] : 16) || !whole);
    size_t length = sizeof head + head[2] + head[3];
    assert(whole ? request->length == length : request->length <= length);
}

static int sim_clock_gettime(int which, struct timespec *t)
{
    (void)which;
    *t = (struct timespec){clock_ms / 1000, clock_ms % 1000 * 1000000};
    return 0;
}

static int sim_open(const char *path, int flags, ...)
{
    size_t length = strlen(path), suffix = strlen("/config.json");
    if (hook && !(flags & O_PATH) && length >= suffix && !strcmp(path + length - suffix, "/config.json")) {
        assert(!config_open && flags & O_CLOEXEC);
        return fails(ENOENT) ? -1 : (config_open = 1, CONFIG);
    }
    assert(!hook || (!strncmp(path, "/proc/", 6) && strstr(path, "/ns/net")));
    if (!(flags & O_CREAT))
        return fails(ENOENT) ? -1 : NETNS;
    assert(flags & O_EXCL && flags & O_NOFOLLOW && flags & O_CLOEXEC && !file.open);
    if (disk_fails(EINVAL))
        return -1;
    file.length = 0;
    return file.open = half_written = 1, FILE_FD;
}

static int sim_fstatfs(int fd, struct statfs *at)
{
    assert(fd == NETNS);
    at->f_type = outcome() & 1 ? 0 : 0x6e736673;
    return fails(EIO) ? -1 : 0;
}

static int sim_close(int fd)
{
    struct stream *of = fd == FILE_FD ? &file : &sent;
    if (fd == NETNS)
        return 0;
    if (fd == NOTIFY)
        return assert(notify_open), notify_open = 0;
    if (fd == CONFIG)
        return assert(config_open), config_open = 0;
    assert((fd == FILE_FD || fd == SOCKET) && of->open);
    if (fd == SOCKET && sent.length)
        check_request(&sent, 0);
    return of->open = 0;
}

static ssize_t sim_write(int fd, const void *data, size_t length)
{
    if (fd == FILE_FD ? disk_fails(ENOSPC) : fails(ENOSPC)) {
        /* The answer is printed before the connection is closed: so it is the answer that was lost. */
        if (fd == 1 && sent.open && errno != EINTR)
            undo_since = tries;
        return -1;
    }
    length = part(length);
    assert(fd == 1 || fd == 2 || fd == FILE_FD);
    keep(fd == 1 ? &out : fd == 2 ? &messages : &file, data, length);
    return (ssize_t)length;
}

static ssize_t sim_read(int fd, void *data, size_t length)
{
    if (fd == NOTIFY)
        return errno = EAGAIN, outcome() & 1 ? 16 : -1;
    if (fd == CONFIG) {
        uint8_t how = outcome();
        assert(config_open && stdin_ended);
        size_t some = how < 0x80 ? 0 : length < how ? length : how;
        memset(data, '{', some);
        return how == 0xff ? (errno = EIO, -1) : (ssize_t)some;
    }
    assert(fd == 0);
    if (fails(EIO))
        return -1;
    length = part(length < stdin_left ? length : stdin_left);
    size_t size = (size_t)(stdin_bytes.end - stdin_bytes.at);
    for (size_t i = 0, n; i < length; i += n) {
        n = size < length - i ? size : length - i;
        memcpy((uint8_t *)data + i, stdin_bytes.at, n);
    }
    stdin_left -= length;
    stdin_ended |= length == 0;
    return (ssize_t)length;
}

static int sim_poll(struct pollfd *p, nfds_t count, int timeout)
{
    assert(count == 1 && timeout >= 0);
    uint8_t how = outcome();
    clock_ms += 1;
    if (how == 0xff || (p->fd == NOTIFY && how < 0x80)) {
        clock_ms += timeout;
        return 0;
    }
    return 1;
}

static int sim_socket(int family, int type, int protocol)
{
    assert(family == AF_UNIX && type & SOCK_CLOEXEC && !protocol && !sent.open);
    tries++;
    if (fails(EMFILE))
        return -1;
    sent.length = 0;
    return sent.open = 1, SOCKET;
}

static int sim_connect(int fd, const struct sockaddr *address, socklen_t length)
{
    const struct sockaddr_un *unix_address = (const struct sockaddr_un *)address;
    assert(fd == SOCKET && length == sizeof *unix_address && unix_address->sun_family == AF_UNIX);
    return fails(ECONNREFUSED) ? -1 : 0;
}

static int sim_inotify_init1(int flags)
{
    assert(flags & IN_CLOEXEC && flags & IN_NONBLOCK && !notify_open);
    return fails(EMFILE) ? -1 : (notify_open = 1, NOTIFY);
}

static int sim_inotify_add_watch(int fd, const char *path, uint32_t mask)
{
    (void)path;
    assert(fd == NOTIFY && mask & IN_CREATE && mask & IN_MOVED_TO);
    return fails(ENOENT) ? -1 : 1;
}

static ssize_t sim_sendmsg(int fd, const struct msghdr *message, int flags)
{
    assert(fd == SOCKET && flags & MSG_NOSIGNAL && message->msg_iovlen == 1);
    assert(!message->msg_control || sent.length == 0); /* the fd goes with the first byte, once */
    if (fails(EPIPE))
        return -1;
    size_t length = part(message->msg_iov->iov_len);
    keep(&sent, message->msg_iov->iov_base, length);
    return (ssize_t)length;
}

static ssize_t sim_recv(int fd, void *data, size_t length, int flags)
{
    assert(fd == SOCKET && !flags);
    check_request(&sent, 1);
    if (undo_since >= 0 && !strcmp(verb, "ADD") && sent.length < sizeof sent.data)
        assert(memmem(sent.data, sent.length, "CNI_COMMAND=DEL", sizeof "CNI_COMMAND=DEL"));
    if (fails(ECONNRESET))
        return -1;
    size_t left = (size_t)(answers.end - answers.at);
    length = part(length < left ? length : left);
    memcpy(data, answers.at, length);
    answers.at += length;
    answered |= length > 0;
    return (ssize_t)length;
}

static void *sim_malloc(size_t length)
{
    if (outcome() == 0xfe) {
        no_memory = 1;
        return NULL;
    }
    return malloc(length);
}

static int sim_mkdir(const char *path, mode_t mode)
{
    (void)path;
    assert(mode == 0700);
    return disk_fails(EEXIST) ? -1 : 0;
}

static int sim_rename(const char *from, const char *to)
{
    assert(strstr(to, "/pending/") && strlen(from) == strlen(to) + strlen(".new") && !file.open);
    check_request(&file, 1);
    if (disk_fails(EACCES))
        return -1;
    half_written = 0;
    return kept_pending = 1, 0;
}

static int sim_unlink(const char *path)
{
    assert(strlen(path) > 4 && !strcmp(path + strlen(path) - 4, ".new"));
    return half_written = 0;
}

#define clock_gettime(...) sim_clock_gettime(__VA_ARGS__)
#define open(...) sim_open(__VA_ARGS__)
#define fstatfs(...) sim_fstatfs(__VA_ARGS__)
#define close(...) sim_close(__VA_ARGS__)
#define write(...) sim_write(__VA_ARGS__)
#define read(...) sim_read(__VA_ARGS__)
#define poll(...) sim_poll(__VA_ARGS__)
#define socket(...) sim_socket(__VA_ARGS__)
#define connect(...) sim_connect(__VA_ARGS__)
#define inotify_init1(...) sim_inotify_init1(__VA_ARGS__)
#define inotify_add_watch(...) sim_inotify_add_watch(__VA_ARGS__)
#define sendmsg(...) sim_sendmsg(__VA_ARGS__)
#define recv(...) sim_recv(__VA_ARGS__)
#define malloc(...) sim_malloc(__VA_ARGS__)
#define mkdir(...) sim_mkdir(__VA_ARGS__)
#define rename(...) sim_rename(__VA_ARGS__)
#define unlink(...) sim_unlink(__VA_ARGS__)
#define main shim_main
#include "../../../cni/shim/vmtap.c"
#undef open
#undef close
#undef read
#undef malloc
#undef main

/* The next bytes of the input whose length precedes them; all that is left if that is less. */
static struct slice take(const uint8_t **at, const uint8_t *end)
{
    size_t length = 0, left = (size_t)(end - *at);
    if (left >= 2) {
        length = (size_t)(*at)[0] | (size_t)(*at)[1] << 8;
        *at += 2;
        left -= 2;
    }
    struct slice taken = {*at, *at + (length < left ? length : left)};
    *at = taken.end;
    return taken;
}

/* An environment of the entries in the slice, each in memory of its own; stops at count. */
static void make_environment(struct slice from, char **entries, size_t count)
{
    size_t n = 0;
    while (from.at < from.end && n + 1 < count) {
        size_t length = strnlen((const char *)from.at, (size_t)(from.end - from.at));
        entries[n] = malloc(length + 1);
        memcpy(entries[n], from.at, length);
        entries[n++][length] = 0;
        from.at += length + (from.at + length < from.end);
    }
    entries[n] = NULL;
}

/* After the shim's end. */
static void check(int status, int long_paths)
{
    assert(!file.open && !notify_open && !config_open && (no_memory || !sent.open) && !half_written);
    if (hook && !answered)
        assert(status == 1 && !out.length && !kept_pending);
    if (!answered && out.length) {
        size_t last = out.length - 1;
        assert(out.length < 1024 && out.data[0] == '{');
        if (out.data[last] == '\n') /* else a write has failed in the middle */
            assert(out.data[last - 1] == '}' && memchr(out.data, '\n', out.length) == out.data + last);
        for (size_t i = 0; i < last; i++)
            assert(out.data[i] >= ' ' && out.data[i] <= '~');
    }
    if (!strcmp(verb, "DEL") && stdin_ended && !answered && !no_memory) {
        assert(status == 0);
        assert(kept_pending || disk_failed || long_paths);
    }
    if (kept_pending)
        assert(!strcmp(verb, "DEL"));
    if (undo_since >= 0 && !strcmp(verb, "ADD"))
        assert(tries > undo_since);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static char *names[] = {"/opt/cni/bin/vmtap", "/opt/cni/bin/macvtap"};
    static char hook_name[] = "/opt/cni/bin/vmtap-hook", claim[] = "8c6a2f5e-6c1b-4f0e-9a57-0d1f5a1f7a10";
    char *entries[64], *argv[] = {NULL, NULL, NULL}, **own = environ;
    const uint8_t *at = data, *end = data + size;
    uint8_t flags = at < end ? *at++ : 0;
    struct slice environment = take(&at, end);
    make_environment(environment, entries, sizeof entries / sizeof *entries);
    stdin_bytes = take(&at, end);
    answers = take(&at, end);
    outcomes = (struct slice){at, end};
    stdin_left = (size_t)(stdin_bytes.end - stdin_bytes.at);
    if (flags & LARGE_STDIN && stdin_left)
        stdin_left += INPUT_MAX - 1;
    out.length = messages.length = file.length = sent.length = 0;
    out.open = file.open = sent.open = 0;
    config_open = notify_open = stdin_ended = answered = tries = no_memory = half_written = kept_pending = disk_failed = 0;
    undo_since = -1;
    clock_ms = 1000;
    head = (struct head){.magic = MAGIC};
    command = "";

    environ = entries;
    verb[0] = 0;
    if (getenv("CNI_COMMAND"))
        snprintf(verb, sizeof verb, "%s", getenv("CNI_COMMAND"));
    argv[0] = flags & WITHOUT_ARGV ? NULL : names[flags & CALLED_AS_MACVTAP];
    hook = argv[0] && flags & CALLED_AS_HOOK;
    if (hook) {
        argv[0] = hook_name;
        argv[1] = flags & WITH_CLAIM ? claim : NULL;
        snprintf(verb, sizeof verb, "HOOK");
    }
    int status = shim_main(argv[1] ? 2 : argv[0] ? 1 : 0, argv);
    environ = own;
    check(status, environment.end - environment.at > 400);
    for (char **e = entries; *e; e++)
        free(*e);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t data[1 << 16];
    for (int i = 1; i < argc; i++) {
        int fd = open(argv[i], O_RDONLY);
        ssize_t size = fd < 0 ? -1 : read(fd, data, sizeof data);
        if (size < 0)
            return perror(argv[i]), 2;
        close(fd);
        fprintf(stderr, "%s\n", argv[i]); /* the last one is that which fails */
        uint8_t *exact = malloc((size_t)size + 1); /* the sanitizer sees what is read past its end */
        memcpy(exact, data, (size_t)size);
        LLVMFuzzerTestOneInput(exact, (size_t)size);
        free(exact);
    }
    return 0;
}
#endif
