/* Starts processes for the benchmark and measures them.
 *
 * It is C and small because a child starts by vfork, and the child's ru_maxrss begins at its parent's (exec_mmap in
 * fs/exec.c). It runs in the node's network namespace, so that no nsenter is measured. It ends at the end of stdin.
 *
 * Request:  uint32 jobs; for each: struct job, arguments and environment (each ends with a NUL), stdin of the child.
 * Answer:   for each job: struct outcome, stdout of the child. All jobs of a request run at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define OUTPUT_MAX 65536u /* what a pipe holds */
#define SECONDS 120

struct job { uint32_t arguments, variables, strings_length, stdin_length; };
struct outcome { int32_t status; uint32_t stdout_length; uint64_t begin_ns, end_ns, cpu_us, peak_kib; };
struct child { pid_t pid; int out; struct outcome outcome; };

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void require(int condition)
{
    if (!condition)
        _exit(70);
}

static void *allocate(size_t size)
{
    void *memory = malloc(size + 1);
    require(memory != NULL);
    return memory;
}

static int read_all(void *data, size_t length)
{
    for (char *at = data; length;) {
        ssize_t n = read(0, at, length);
        if (n <= 0)
            return 0;
        at += n;
        length -= (size_t)n;
    }
    return 1;
}

static void write_all(int fd, const void *data, size_t length)
{
    for (const char *at = data; length;) {
        ssize_t n = write(fd, at, length);
        require(n > 0);
        at += n;
        length -= (size_t)n;
    }
}

static char **pointers(char **at, uint32_t count)
{
    char **list = allocate((count + 1) * sizeof *list);
    for (uint32_t i = 0; i < count; i++, *at += strlen(*at) + 1)
        list[i] = *at;
    list[count] = NULL;
    return list;
}

static void start(struct child *child, char *const *argv, char *const *env, int in, int out)
{
    child->outcome.begin_ns = now_ns();
    child->pid = vfork();
    if (child->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(in, 0);
        dup2(out, 1);
        execve(argv[0], argv, env);
        _exit(127);
    }
    require(child->pid > 0);
}

static void finish(struct child *children, uint32_t count)
{
    int status;
    struct rusage used;
    pid_t pid = wait4(-1, &status, 0, &used);
    uint64_t end = now_ns();
    require(pid > 0);
    for (uint32_t i = 0; i < count; i++)
        if (children[i].pid == pid) {
            struct outcome *outcome = &children[i].outcome;
            outcome->end_ns = end;
            outcome->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            outcome->cpu_us = (uint64_t)((used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000 +
                                         used.ru_utime.tv_usec + used.ru_stime.tv_usec);
            outcome->peak_kib = (uint64_t)used.ru_maxrss;
        }
}

int main(void)
{
    static char output[OUTPUT_MAX];
    uint32_t count;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (read_all(&count, sizeof count)) {
        struct child *children = allocate(count * sizeof *children);
        char ***argv = allocate(count * sizeof *argv), ***env = allocate(count * sizeof *env);
        char **strings = allocate(count * sizeof *strings);
        int(*ends)[2] = allocate(count * sizeof *ends);
        for (uint32_t i = 0; i < count; i++) {
            struct job job;
            int out[2];
            require(read_all(&job, sizeof job));
            strings[i] = allocate((size_t)job.strings_length + job.stdin_length);
            require(read_all(strings[i], (size_t)job.strings_length + job.stdin_length));
            char *at = strings[i];
            argv[i] = pointers(&at, job.arguments);
            env[i] = pointers(&at, job.variables);
            require(!pipe2(ends[i], O_CLOEXEC) && !pipe2(out, O_CLOEXEC));
            write_all(ends[i][1], strings[i] + job.strings_length, job.stdin_length);
            close(ends[i][1]);
            ends[i][1] = out[1];
            memset(&children[i], 0, sizeof children[i]);
            children[i].out = out[0];
        }
        alarm(SECONDS); /* ends this process, and with it the children */
        for (uint32_t i = 0; i < count; i++)
            start(&children[i], argv[i], env[i], ends[i][0], ends[i][1]);
        for (uint32_t i = 0; i < count; i++)
            finish(children, count);
        alarm(0);
        for (uint32_t i = 0; i < count; i++) {
            close(ends[i][0]);
            close(ends[i][1]);
            ssize_t n = read(children[i].out, output, sizeof output);
            require(n >= 0);
            close(children[i].out);
            children[i].outcome.stdout_length = (uint32_t)n;
            write_all(1, &children[i].outcome, sizeof children[i].outcome);
            write_all(1, output, (size_t)n);
            free(strings[i]);
            free(argv[i]);
            free(env[i]);
        }
        free(children);
        free(argv);
        free(env);
        free(strings);
        free(ends);
    }
    return 0;
}
