/* vmtap, the CNI executable of a node: sends the request to the resident agent and prints the agent's answer.
 *
 * A static executable of one source file, so that one call of a compiler builds it. It has no dependencies: the host
 * need not have Python, which the agent is written in, and Multus runs plugins chrooted into the host. Decides nothing,
 * except while the agent is away (see below).
 *
 * Request:  struct head { magic, called as, length of env, length of stdin }, the environment (each entry ends with a
 *           NUL), stdin. The first byte carries, by SCM_RIGHTS, an fd of CNI_NETNS if that can be opened.
 * Answer:   struct tail { exit status, length of stdout, length of stderr }, stdout, stderr.
 * The lengths precede the data. cni/agent/wire.py implements the agent's side.
 *
 * `vmtap --supervise PARENT PROGRAM` does something else: see supervise().
 *
 * Under the name vmtap-hook it is an OCI hook, createRuntime: `vmtap-hook CLAIM-UID`, with the container's state on
 * stdin. The agent gets the container's config.json as stdin and an fd of its network namespace, and an environment of
 * CNI_COMMAND=HOOK and VMTAP_CLAIM. Without an answer, and if it is an error, the container is not started.
 *
 * If the agent does not answer within VMTAP_WAIT seconds (ADD 20, others 5): ADD, CHECK and GC fail with code 11 (try
 * again later), STATUS with 50; VERSION is answered here. DEL succeeds, so that pods can always be deleted: the request
 * is written to the folder pending/, and the agent carries it out when it is back (cni/agent/reconcile/pending.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h> /* rename(2) */
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef VMTAP_RUN
#define VMTAP_RUN "/run/vmtap"
#endif
#define NSFS_MAGIC 0x6e736673 /* linux/magic.h, which musl-gcc does not find */
#define MAGIC 0x31746d76u /* "vmt1" */
#define INPUT_MAX (1u << 20)
#define ENV_MAX (1u << 20)
#define OUTPUT_MAX (16u << 20)
#define ROOM (1u << 14) /* fits nearly every answer */
#define INPUT_SECONDS 10
#define TRIES 3 /* connections that the agent closes without an answer before it counts as away */
#define VERSIONS "\"0.1.0\",\"0.2.0\",\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\""

enum { VMTAP, MACVTAP, HOOK };
struct head { uint32_t magic, called_as, env_length, stdin_length; };
struct tail { int32_t status; uint32_t stdout_length, stderr_length; };

extern char **environ;

/* The request as it is sent: head, environment, stdin. Then room for an answer: few pages are touched, none copied. */
static char request[sizeof(struct head) + ENV_MAX + INPUT_MAX + 1 + ROOM];
static struct head head = {.magic = MAGIC};
static char *const env = request + sizeof head;
static char *input;
static const char *command = "";

static size_t request_length(void)
{
    return sizeof head + head.env_length + head.stdin_length;
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

/* The value of an environment variable, whole seconds up to a day, else otherwise; in milliseconds. */
static int64_t seconds(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    char *end = NULL;
    long value = text && *text ? strtol(text, &end, 10) : -1;
    return (end && !*end && value >= 0 && value <= 86400 ? value : otherwise) * 1000;
}

/* Concatenate the pieces, up to a NULL, into text; 0 if they do not fit. stdio would be most of the file. */
static int join(char *text, size_t size, ...)
{
    va_list pieces;
    size_t length = 0;
    va_start(pieces, size);
    for (const char *piece; (piece = va_arg(pieces, const char *));) {
        size_t more = strlen(piece);
        if (more >= size - length) {
            va_end(pieces);
            return 0;
        }
        memcpy(text + length, piece, more);
        length += more;
    }
    va_end(pieces);
    text[length] = 0;
    return 1;
}

/* The number in decimal, written to the end of room. */
static const char *decimal(char room[24], uint64_t number)
{
    char *at = room + 23;
    *at = 0;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10);
    return at;
}

/* An fd of the network namespace at path, or -1. Anything else is opened with O_PATH only, and the agent refuses it. */
static int open_netns(const char *path)
{
    struct statfs at;
    int seen = open(path, O_PATH | O_CLOEXEC);
    if (seen < 0 || fstatfs(seen, &at) || at.f_type != NSFS_MAGIC)
        return seen;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return seen;
    close(seen);
    return fd;
}

static int write_all(int fd, const char *data, size_t length)
{
    while (length) {
        ssize_t n = write(fd, data, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        data += n;
        length -= (size_t)n;
    }
    return 0;
}

/* Print an error object (SPEC section 5, "Error"), unless for a hook, and the message on stderr; returns 1. It must not
 * need escapes. */
static int fail(int code, const char *message)
{
    char text[512], number[24];
    join(text, sizeof text, "{\"cniVersion\":\"1.1.0\",\"code\":", decimal(number, (uint64_t)code), ",\"msg\":\"",
         message, "\"}\n", NULL);
    if (head.called_as != HOOK)
        write_all(1, text, strlen(text));
    join(text, sizeof text, "vmtap: ", message, "\n", NULL);
    write_all(2, text, strlen(text));
    return 1;
}

/* Read fd to its end into input. 0, or a CNI error code: 5 if it fails or takes too long, 6 if it is too large. */
static int read_input(int fd)
{
    int64_t until = now_ms() + INPUT_SECONDS * 1000;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    head.stdin_length = 0;
    while (head.stdin_length <= INPUT_MAX) {
        int64_t left = until - now_ms();
        if (left <= 0 || (poll(&p, 1, (int)left) == 0))
            return 5;
        ssize_t n = read(fd, input + head.stdin_length, INPUT_MAX + 1 - head.stdin_length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return 5;
        if (n == 0) {
            input[head.stdin_length] = 0;
            return 0;
        }
        head.stdin_length += (uint32_t)n;
    }
    return 6;
}

/* The value of a member of the JSON object text, which may be invalid; "" without it. name needs no escapes. */
static const char *member(const char *text, const char *name)
{
    size_t length = strlen(name);
    int depth = 0;
    for (const char *at = text; *at; at++) {
        depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
        if (*at != '"')
            continue;
        const char *begin = ++at;
        while (*at && *at != '"')
            at += *at == '\\' && at[1] ? 2 : 1;
        if (!*at)
            break;
        const char *value = at + 1 + strspn(at + 1, " \t\r\n");
        if (depth == 1 && *value == ':' && (size_t)(at - begin) == length && !memcmp(begin, name, length))
            return value + 1 + strspn(value + 1, " \t\r\n");
    }
    return "";
}

/* Read a container's state (OCI runtime specification, "State") from stdin, and its config.json into input; write the
 * path of its network namespace to netns. 0, or a CNI error code. */
static int read_container(char netns[64])
{
    char config[PATH_MAX], pid[24];
    int code = read_input(0);
    if (code)
        return code;
    const char *bundle = member(input, "bundle");
    long process = strtol(member(input, "pid"), NULL, 10);
    size_t length = *bundle == '"' ? strcspn(++bundle, "\"\\") : 0;
    if (process <= 0 || !length || bundle[length] != '"' || length >= sizeof config)
        return 6;
    input[(size_t)(bundle - input) + length] = 0;
    if (!join(config, sizeof config, bundle, "/config.json", NULL))
        return 6;
    join(netns, 64, "/proc/", decimal(pid, (uint64_t)process), "/ns/net", NULL);
    int fd = open(config, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 5;
    code = read_input(fd);
    close(fd);
    return code;
}

/* A connection to the unix socket at path, or -1. */
static int connect_once(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -1;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

/* A connection to the agent, or -1 after until. Waits by inotify for the socket, which a starting agent creates. */
static int connect_agent(const char *folder, const char *path, int64_t until)
{
    int fd = connect_once(path);
    if (fd >= 0)
        return fd;
    int notify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (notify < 0 || inotify_add_watch(notify, folder, IN_CREATE | IN_MOVED_TO) < 0) {
        if (notify >= 0)
            close(notify);
        return -1; /* no folder: no agent has ever run here */
    }
    for (;;) {
        char events[4096];
        struct pollfd p = {.fd = notify, .events = POLLIN};
        fd = connect_once(path); /* after the watch is set: no creation is missed */
        int64_t left = until - now_ms();
        if (fd >= 0 || left <= 0)
            break;
        poll(&p, 1, (int)left);
        while (read(notify, events, sizeof events) > 0)
            ;
    }
    close(notify);
    return fd;
}

/* Send all of data, and with the first byte the fd pass if it is not -1; 0 or -1. */
static int send_all(int fd, const void *data, size_t length, int pass)
{
    union { char bytes[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control = {{0}};
    while (length) {
        struct iovec io = {.iov_base = (void *)(uintptr_t)data, .iov_len = length};
        struct msghdr message = {.msg_iov = &io, .msg_iovlen = 1};
        if (pass >= 0) {
            message.msg_control = control.bytes;
            message.msg_controllen = sizeof control.bytes;
            struct cmsghdr *c = CMSG_FIRSTHDR(&message);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof(int));
            memcpy(CMSG_DATA(c), &pass, sizeof pass);
        }
        ssize_t n = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        pass = -1;
        data = (const char *)data + n;
        length -= (size_t)n;
    }
    return 0;
}

/* Receive at least, and at most, so many bytes. The number, or -1 if the agent closes the connection or until passes. */
static ssize_t receive(int fd, char *data, size_t least, size_t most, int64_t until)
{
    size_t length = 0;
    while (length < least) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int64_t left = until - now_ms();
        if (left <= 0 || poll(&p, 1, (int)(left > INT_MAX ? INT_MAX : left)) == 0)
            return -1;
        ssize_t n = recv(fd, data + length, most - length, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        length += (size_t)n;
    }
    return (ssize_t)length;
}

/* Send the request, print the answer. The exit status; -1: no whole answer, nothing printed; -2: stdout failed. */
static int ask(int fd, int netns, int64_t until)
{
    struct tail tail;
    char *room = request + request_length() + 1; /* the input keeps its NUL */
    /* In one send: the agent then reads it with one call. */
    ssize_t first = send_all(fd, request, request_length(), netns) ? -1 : receive(fd, room, sizeof tail, ROOM, until);
    if (first < 0)
        return -1;
    memcpy(&tail, room, sizeof tail);
    size_t got = (size_t)first - sizeof tail, total = (size_t)tail.stdout_length + tail.stderr_length;
    char *text = total <= ROOM - sizeof tail ? room + sizeof tail : total <= OUTPUT_MAX ? malloc(total) : NULL;
    if (text && text != room + sizeof tail)
        memcpy(text, room + sizeof tail, got);
    int status = -1;
    if (text && got <= total &&
        receive(fd, text + got, total - got, total - got, until) == (ssize_t)(total - got)) {
        write_all(2, text + tail.stdout_length, tail.stderr_length);
        status = write_all(1, text, tail.stdout_length) ? -2 : tail.status;
    }
    if (text != room + sizeof tail)
        free(text);
    return status;
}

/* DEL without an agent: write the request to pending/, under a unique name, for the agent to carry out. */
static void leave_pending(const char *folder)
{
    char written[PATH_MAX], path[PATH_MAX], nanoseconds[24], pid[24];
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    uint64_t now = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    if (!join(path, sizeof path, folder, "/pending", NULL) || (mkdir(path, 0700) && errno != EEXIST) ||
        !join(path, sizeof path, folder, "/pending/", decimal(nanoseconds, now), ".", decimal(pid, (uint64_t)getpid()),
              NULL) ||
        !join(written, sizeof written, path, ".new", NULL))
        return;
    int fd = open(written, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return;
    int bad = write_all(fd, request, request_length());
    close(fd);
    if (bad || rename(written, path))
        unlink(written);
}

/* VERSION without an agent: print the result, with the config's cniVersion if that is digits and dots. */
static int print_version(void)
{
    char text[512], version[32] = "1.1.0";
    const char *at = strstr(input, "\"cniVersion\"");
    if (at) {
        at += strlen("\"cniVersion\"");
        at += strspn(at, " \t\r\n:");
        size_t digits = *at == '"' ? strspn(at + 1, "0123456789.") : 0;
        if (digits && digits < sizeof version && at[1 + digits] == '"') {
            memcpy(version, at + 1, digits);
            version[digits] = 0;
        }
    }
    join(text, sizeof text, "{\"cniVersion\":\"", version, "\",\"supportedVersions\":[" VERSIONS "]}\n", NULL);
    return write_all(1, text, strlen(text)) ? 1 : 0;
}

/* The answer to each command while the agent is away; the exit status. */
static int without_agent(const char *folder)
{
    if (!strcmp(command, "VERSION"))
        return print_version();
    if (!strcmp(command, "DEL")) {
        leave_pending(folder);
        return 0;
    }
    if (!strcmp(command, "STATUS"))
        return fail(50, "the agent vmtapd is not running on this node: look at its pod or systemctl status vmtapd");
    return fail(11, "the agent vmtapd does not answer: try again; look at its pod or systemctl status vmtapd");
}

/* Send SIGKILL to every child of this process, and wait for all, and for those that become its children meanwhile. */
static void end_children(pid_t group)
{
    char path[64], number[24], list[4096];
    join(path, sizeof path, "/proc/self/task/", decimal(number, (uint64_t)getpid()), "/children", NULL);
    do {
        if (group > 0)
            kill(-group, SIGKILL);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) /* a kernel without CONFIG_PROC_CHILDREN: no more than the group can be ended */
            return;
        ssize_t n = read(fd, list, sizeof list - 1); /* the rest is read in the next round */
        close(fd);
        list[n > 0 ? n : 0] = 0;
        char *end;
        for (char *at = list; (n = strtol(at, &end, 10)) > 0 && *end == ' '; at = end)
            kill((pid_t)n, SIGKILL);
    } while (waitpid(-1, NULL, 0) > 0);
}

/* Run the program, an IPAM delegate of the process parent, until it ends or SIGTERM arrives, which the end of parent
 * sends, too. Then end all that it has started: this process is their reaper (PR_SET_CHILD_SUBREAPER in prctl(2)), so
 * each becomes its child at last, whatever session or process group it is in. The exit status is the program's, or
 * 128 and the number of the signal that ended it. */
static int supervise(const char *parent, char *const program[])
{
    sigset_t awaited, before;
    int status = 0;
    sigemptyset(&awaited);
    sigaddset(&awaited, SIGCHLD);
    sigaddset(&awaited, SIGTERM);
    sigprocmask(SIG_BLOCK, &awaited, &before);
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
    if (getppid() != (pid_t)strtol(parent, NULL, 10)) /* it ended before prctl */
        return 1;
    pid_t self = getpid(), child = fork();
    if (child < 0)
        return fail(109, "the IPAM plugin cannot be started");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* without its supervisor it might lease after its DEL */
        if (getppid() != self)
            _exit(1);
        setpgid(0, 0);
        sigprocmask(SIG_SETMASK, &before, NULL);
        execv(program[0], program);
        _exit(fail(109, "the IPAM plugin cannot be executed"));
    }
    setpgid(child, child);
    /* Only the program may hold the pipes, or their readers would wait for this process. */
    for (int fd = 0; fd < 2; fd++)
        close(fd);
    for (pid_t ended = 0; ended != child;) {
        if (sigwaitinfo(&awaited, NULL) == SIGTERM)
            break;
        while ((ended = waitpid(-1, &status, WNOHANG)) > 0 && ended != child)
            ;
        if (ended < 0)
            break;
    }
    end_children(child);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "--supervise"))
        return supervise(argv[2], argv + 3);
    const char *name = argc > 0 && strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argc > 0 ? argv[0] : "";
    const char *folder = getenv("VMTAP_RUN");
    /* The paths are longer than connect(2) takes, and all on one page. */
    char agent[512], path[512], claim[80], container[64], *const hooks[] = {"CNI_COMMAND=HOOK", claim, NULL};
    head.called_as = !strcmp(name, "macvtap") ? MACVTAP : !strcmp(name, "vmtap-hook") ? HOOK : VMTAP;
    signal(SIGPIPE, SIG_IGN); /* a closed stdout must be an error of write(2), upon which an ADD is undone */
    if (!folder || !*folder)
        folder = getenv("VMTAP_STATE"); /* a deprecated alias */
    if (!folder || !*folder)
        folder = VMTAP_RUN;
    if (getenv("CNI_COMMAND"))
        command = getenv("CNI_COMMAND");
    char *const *variables = environ;
    if (head.called_as == HOOK) {
        if (argc < 2 || !join(claim, sizeof claim, "VMTAP_CLAIM=", argv[1], NULL))
            return fail(4, "vmtap-hook needs the UID of a resource claim");
        command = "HOOK";
        variables = hooks;
    }
    int any = 0;
    char *end = env, *verb = env;
    for (char *const *e = variables; *e; e++) {
        size_t length = strlen(*e) + 1;
        any |= !strncmp(*e, "CNI_", 4);
        if (length > (size_t)(env + ENV_MAX - end))
            return fail(4, "the environment is too large");
        if (verb == env && !strncmp(*e, "CNI_COMMAND=", strlen("CNI_COMMAND="))) /* the first, as getenv(3) returns */
            verb = end + strlen("CNI_COMMAND=");
        memcpy(end, *e, length);
        end += length;
    }
    if (!any) {
        static const char about[] = "vmtap: a CNI plugin that puts a VM on a NIC; a container runtime runs it.\n"
                                    "CNI protocol versions supported: " VERSIONS "\n";
        write_all(2, about, sizeof about - 1);
        return 0;
    }
    if (!join(agent, sizeof agent, folder, "/agent", NULL) || !join(path, sizeof path, agent, "/cni.sock", NULL))
        return fail(4, "VMTAP_RUN is too long");
    input = end;
    head.env_length = (uint32_t)(end - env);
    int code = head.called_as == HOOK ? read_container(container) : read_input(0);
    if (code && head.called_as == HOOK)
        return fail(code, "the container's state on stdin, or its config.json, cannot be read");
    if (code == 6 && !strcmp(command, "DEL")) {
        code = 0;
        input[0] = 0;
        head.stdin_length = 0; /* no ADD has accepted it, and container id and ifname name the attachment */
    }
    if (code)
        return fail(code, code == 6 ? "the network config is larger than 1 MiB"
                                    : "the network config on stdin did not end");
    memcpy(request, &head, sizeof head);

    /* A hook is given 30 seconds, and its message is lost if it is killed. */
    int64_t begin = now_ms(), until = begin + seconds("VMTAP_DEADLINE", head.called_as == HOOK ? 25 : 120);
    /* An upgrade leaves a node without an agent for a second, a busy node for more: an ADD waits for the new one. */
    int64_t wait = seconds("VMTAP_WAIT", strcmp(command, "ADD") && head.called_as != HOOK ? 5 : 20);
    const char *netns_path = head.called_as == HOOK ? container : getenv("CNI_NETNS");
    int netns = netns_path && *netns_path ? open_netns(netns_path) : -1;
    int fd = connect_agent(agent, path, begin + wait); /* late: the agent that it wakes finds the request */

    int status = -1;
    for (int tries = 1; fd >= 0; tries++) {
        status = ask(fd, netns, until);
        close(fd);
        /* The agent ended before it answered: repeat the request, except ADD, which is not idempotent. */
        if (status != -1 || tries == TRIES || now_ms() >= until || !strcmp(command, "ADD"))
            break;
        fd = connect_agent(agent, path, now_ms() + wait);
    }
    if (status == -2 && !strcmp(command, "ADD")) { /* the runtime did not get the result: undo the attachment */
        memcpy(verb, "DEL", 3);
        fd = connect_agent(agent, path, now_ms() + wait);
        if (fd >= 0) {
            ask(fd, netns, until);
            close(fd);
        }
    }
    if (status == -1)
        status = without_agent(folder);
    return status < 0 ? 1 : status;
}
