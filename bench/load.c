/* load: a load generator for line protocols, one thread, one epoll set, no dependency.
 *
 * It sends one fixed request again and again and demands one fixed reply, byte for byte: an error line or a
 * reply out of place is counted as an error, never as throughput.  Everything is bounded before it starts:
 * seconds, connections, requests in flight.  The answer is one line of JSON on standard output, with the share
 * of a core that the generator itself used, so that a reader can tell a slow server from a slow client.
 *
 *   persistent  N connections; each writes `depth` requests at once, reads all the replies, and again
 *   connect     N slots; each connects, asks once, reads the reply, closes, and again on a new connection
 *   paced       N connections and a fixed rate for all of them together: for latency, not for throughput
 *   idle        opens N silent connections and holds them until standard input ends
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    CONNECTIONS_MAX = 60000,
    DEPTH_MAX = 1000,
    LINE_BYTES_MAX = 1024,       /* one request or one reply, after its escapes are read */
    EVENTS_PER_WAIT = 256,
    IDLE_PER_SOURCE = 5000,      /* far below the ~28,000 ephemeral ports that one source address has */
    IDLE_PER_BURST = 50,         /* connects before a pause: no backlog may overflow, a lost SYN costs 1 s */
    IDLE_PAUSE_NS = 5 * 1000 * 1000,
    HOLD_SECONDS_MAX = 600,      /* a forgotten idle run ends by itself */
};
#define SECONDS_MAX 120.0
#define DRAIN_NS 1000000000LL    /* after the end: what is not answered by then counts as an error */

/* ---- small things ------------------------------------------------------------------------------------- */

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* ---- latency histogram: 64 steps for each power of two, so a percentile is at most 1.6 % too high ------- */

enum { STEP_BITS = 6, STEPS = 1 << STEP_BITS, BUCKETS = (64 - STEP_BITS) * STEPS };

struct histogram {
    uint64_t count[BUCKETS];
    uint64_t total;
    int64_t max_ns;
};

static int bucket_of(int64_t ns)
{
    if (ns < STEPS)
        return ns < 0 ? 0 : (int)ns;
    int shift = 63 - __builtin_clzll((unsigned long long)ns) - STEP_BITS;
    return (shift + 1) * STEPS + (int)((ns >> shift) - STEPS);
}

static int64_t bucket_top_ns(int bucket)
{
    if (bucket < STEPS)
        return bucket;
    int shift = bucket / STEPS - 1;
    return ((int64_t)(bucket % STEPS + STEPS + 1) << shift) - 1;
}

static void histogram_add(struct histogram *h, int64_t ns)
{
    h->count[bucket_of(ns)]++;
    h->total++;
    if (ns > h->max_ns)
        h->max_ns = ns;
}

static double percentile_us(const struct histogram *h, double share)
{
    uint64_t rank = (uint64_t)((double)h->total * share), seen = 0;
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        seen += h->count[bucket];
        if (seen > rank || (seen > 0 && seen == h->total)) {
            int64_t top_ns = bucket_top_ns(bucket);
            return (double)(top_ns < h->max_ns ? top_ns : h->max_ns) / 1e3;
        }
    }
    return 0.0;
}

/* ---- what was asked for ------------------------------------------------------------------------------- */

enum mode { PERSISTENT, CONNECT, PACED, IDLE };

static struct {
    enum mode mode;
    struct sockaddr_in server;
    char *request, *reply;          /* `depth` of each, joined: one write, one comparison */
    size_t request_bytes, reply_bytes;
    int connections, depth;
    long connects_max;              /* connect mode: stop after this many, however fast the server is */
    double warmup_seconds, seconds, rate_per_second;
} ask = {
    .connections = 50, .depth = 1, .connects_max = 20000, .warmup_seconds = 0.5, .seconds = 2.0,
    .rate_per_second = 1000.0,
};

/* ---- what came of it ---------------------------------------------------------------------------------- */

static struct {
    struct histogram latency;
    uint64_t requests, errors;
    int64_t begun_ns, ended_ns;     /* of the measured part, after the warm-up */
    double cpu_begun, cpu_ended;
    bool measuring, draining;       /* draining: the time is up, nothing new is sent */
    char first_error[160];
} result;

__attribute__((format(printf, 1, 2))) static void note_error(const char *format, ...)
{
    if (result.errors++ > 0)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(result.first_error, sizeof result.first_error, format, args);
    va_end(args);
    for (char *c = result.first_error; *c; c++)   /* it goes into JSON as it is */
        if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
            *c = '.';
}

static void note_replies(int replies, int64_t began_ns, int64_t ended_ns)
{
    if (!result.measuring)
        return;
    result.requests += (uint64_t)replies;
    histogram_add(&result.latency, ended_ns - began_ns);
}

static void begin_measuring(int64_t now)
{
    result.measuring = true;
    result.begun_ns = now;
    result.cpu_begun = cpu_seconds();
}

static void print_result(void)
{
    double seconds = (double)(result.ended_ns - result.begun_ns) / 1e9;
    double cpu_share = seconds > 0 ? (result.cpu_ended - result.cpu_begun) / seconds : 0.0;
    printf("{\"requests\": %llu, \"seconds\": %.4f, \"rps\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, "
           "\"max_us\": %.1f, \"errors\": %llu, \"first_error\": \"%s\", \"generator_cpu_share\": %.3f}\n",
           (unsigned long long)result.requests, seconds, seconds > 0 ? (double)result.requests / seconds : 0.0,
           percentile_us(&result.latency, 0.50), percentile_us(&result.latency, 0.99),
           (double)result.latency.max_ns / 1e3, (unsigned long long)result.errors, result.first_error, cpu_share);
    fflush(stdout);
}

/* ---- connections -------------------------------------------------------------------------------------- */

struct conn {
    int fd;                         /* -1: closed */
    bool connecting, waiting;       /* waiting: a request is out, its reply is not complete */
    size_t got_bytes;               /* of the reply to the request that is out */
    int64_t began_ns;
    uint32_t source;                /* connect mode: this slot's own loopback address, host order */
    struct conn *next_free;         /* paced mode */
};

static struct conn *conns;
static int epoll_fd;
static long connects_begun;
static int open_conns;

static void watch(struct conn *c, uint32_t events, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/* A TCP socket, bound to `source` when that is not 0.  The port is left to connect(), which then may use one
 * port for many servers and skips those in TIME_WAIT. */
static int new_socket(uint32_t source, int flags)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), on = 1;
    if (fd < 0)
        die("socket: %s", strerror(errno));
    if (source == 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);   /* the others write once at most */
        return fd;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(source)};
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        die("bind: %s", strerror(errno));
    return fd;
}

static void close_conn(struct conn *c)
{
    close(c->fd);
    c->fd = -1;
    c->waiting = c->connecting = false;
    open_conns--;
}

enum outcome { PART, WHOLE, LOST };

/* PART: the connection is not established yet.  Otherwise the socket's buffer was empty, so anything short of
 * the whole request is a fault, not a full buffer. */
static enum outcome send_request(struct conn *c)
{
    ssize_t sent = send(c->fd, ask.request, ask.request_bytes, MSG_NOSIGNAL);
    c->got_bytes = 0;
    c->waiting = sent == (ssize_t)ask.request_bytes;
    if (c->waiting)
        return WHOLE;
    if (sent < 0 && errno == EAGAIN && c->connecting)
        return PART;
    note_error("send: %s", sent < 0 ? strerror(errno) : "short");
    close_conn(c);
    return LOST;
}

/* Takes what has arrived and compares it with the reply that must come. */
static enum outcome take_reply(struct conn *c)
{
    static char buffer[1 << 17];
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return PART;
    if (got <= 0)
        note_error("%s", got == 0 ? "the server closed the connection" : strerror(errno));
    else if (!c->waiting || (size_t)got > ask.reply_bytes - c->got_bytes ||
             memcmp(buffer, ask.reply + c->got_bytes, (size_t)got) != 0)
        note_error("unexpected reply: %.*s", (int)(got < 100 ? got : 100), buffer);
    else {
        c->got_bytes += (size_t)got;
        return c->got_bytes < ask.reply_bytes ? PART : WHOLE;
    }
    close_conn(c);
    return LOST;
}

/* Blocking connects: they come before any measuring. */
static void open_persistent(void)
{
    for (int i = 0; i < ask.connections; i++) {
        struct conn *c = &conns[i];
        c->fd = new_socket(0, 0);
        if (connect(c->fd, (struct sockaddr *)&ask.server, sizeof ask.server) < 0)
            die("connect: %s", strerror(errno));
        open_conns++;
        watch(c, EPOLLIN, EPOLL_CTL_ADD);
    }
}

/* ---- connect mode --------------------------------------------------------------------------------------- */

/* Starts a connect on a fresh socket; moves on to another source address of its own when this one is out of
 * ports, a few times at most: each has some 28,000 of them. */
static bool connect_slot(struct conn *c)
{
    for (int attempt = 0; attempt < 4; attempt++) {
        c->fd = new_socket(c->source, SOCK_NONBLOCK);
        if (connect(c->fd, (struct sockaddr *)&ask.server, sizeof ask.server) == 0 || errno == EINPROGRESS)
            return true;
        int reason = errno;
        close(c->fd);
        c->fd = -1;
        if (reason != EADDRNOTAVAIL) {
            note_error("connect: %s", strerror(reason));
            return false;
        }
        c->source += (uint32_t)ask.connections;
    }
    note_error("connect: no port left");
    return false;
}

/* On loopback the handshake is over when connect() comes back, though it says EINPROGRESS: the request goes out
 * at once and the connection costs one wake-up.  Where it is not over, the slot waits to become writable. */
static void begin_connect(struct conn *c)
{
    if (result.draining || connects_begun >= ask.connects_max)
        return;
    connects_begun++;
    c->began_ns = now_ns();
    if (!connect_slot(c))
        return;
    open_conns++;
    c->connecting = true;
    enum outcome sent = send_request(c);
    if (sent == LOST)
        return;
    c->connecting = sent == PART;
    watch(c, c->connecting ? EPOLLOUT : EPOLLIN, EPOLL_CTL_ADD);
}

static void finish_connect(struct conn *c)
{
    c->connecting = false;
    if (send_request(c) == WHOLE)   /* a failed connect shows here, as the socket's pending error */
        watch(c, EPOLLIN, EPOLL_CTL_MOD);
}

/* An ordinary close, FIN and all, as a client's library does it: no SO_LINGER reset, which would spare the
 * server work that real clients give it. */
static void on_connect_event(struct conn *c)
{
    if (c->connecting) {
        finish_connect(c);
    } else if (take_reply(c) == WHOLE) {
        close_conn(c);
        note_replies(1, c->began_ns, now_ns());
    }
    if (c->fd < 0)
        begin_connect(c);
}

/* ---- persistent and paced modes ------------------------------------------------------------------------- */

static void on_persistent_event(struct conn *c)
{
    if (take_reply(c) != WHOLE)
        return;
    int64_t now = now_ns();
    note_replies(ask.depth, c->began_ns, now);
    c->waiting = false;
    c->began_ns = now;
    if (!result.draining)
        send_request(c);
}

static struct conn *free_conns;
static int timer_fd;
static int64_t paced_from_ns;
static int64_t paced_sent;

static void start_pacing(int64_t now)
{
    int64_t interval_ns = (int64_t)(1e9 / ask.rate_per_second);
    struct itimerspec every = {
        .it_interval = {interval_ns / 1000000000, interval_ns % 1000000000},
        .it_value = {interval_ns / 1000000000, interval_ns % 1000000000},
    };
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer_fd < 0 || timerfd_settime(timer_fd, 0, &every, NULL) < 0 ||
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &event) < 0)
        die("timerfd: %s", strerror(errno));
    paced_from_ns = now;
    for (int i = 0; i < ask.connections; i++) {
        conns[i].next_free = free_conns;
        free_conns = &conns[i];
    }
}

/* Sends what is due.  `late` says that a due request had to wait for a connection: then its latency counts from
 * the moment it was due, so that a server which stalls cannot hide the requests it held up.  A request that is
 * late only because this generator woke late counts from its sending. */
static void send_due(int64_t now, bool late)
{
    int64_t due = (int64_t)((double)(now - paced_from_ns) / 1e9 * ask.rate_per_second);
    while (paced_sent < due && free_conns && !result.draining) {
        struct conn *c = free_conns;
        free_conns = c->next_free;
        int64_t due_ns = paced_from_ns + (int64_t)((double)(++paced_sent) / ask.rate_per_second * 1e9);
        c->began_ns = late && due_ns < now ? due_ns : now;
        send_request(c);
    }
}

static void on_paced_event(struct conn *c)
{
    uint64_t ticks;
    if (c == NULL) {
        if (read(timer_fd, &ticks, sizeof ticks) < 0 && errno != EAGAIN)
            die("timerfd: %s", strerror(errno));
        send_due(now_ns(), false);
    } else if (take_reply(c) == WHOLE) {
        int64_t now = now_ns();
        bool starved = free_conns == NULL;
        note_replies(1, c->began_ns, now);
        c->waiting = false;
        c->next_free = free_conns;
        free_conns = c;
        if (starved)
            send_due(now, true);
    }
}

/* ---- the run ------------------------------------------------------------------------------------------ */

static void start_all(void)
{
    if (ask.mode != CONNECT)
        open_persistent();
    int64_t now = now_ns();
    if (ask.mode == PACED)
        start_pacing(now);
    for (int i = 0; i < ask.connections; i++) {
        if (ask.mode == CONNECT)
            begin_connect(&conns[i]);
        else if (ask.mode == PERSISTENT) {
            conns[i].began_ns = now;
            send_request(&conns[i]);
        }
    }
}

static bool any_waiting(void)
{
    for (int i = 0; i < ask.connections; i++)
        if (conns[i].fd >= 0 && (conns[i].waiting || conns[i].connecting))
            return true;
    return false;
}

static void handle_events(void)
{
    static struct epoll_event events[EVENTS_PER_WAIT];
    int ready = epoll_wait(epoll_fd, events, EVENTS_PER_WAIT, 20);
    if (ready < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < ready; i++) {
        struct conn *c = events[i].data.ptr;
        if (ask.mode == CONNECT)
            on_connect_event(c);
        else if (ask.mode == PACED)
            on_paced_event(c);
        else
            on_persistent_event(c);
    }
}

static void end_measuring(int64_t now)
{
    if (!result.measuring)
        begin_measuring(now);   /* it ended in the warm-up: the result says 0 requests */
    result.ended_ns = now;
    result.cpu_ended = cpu_seconds();
    result.measuring = false;
    result.draining = true;
}

/* Reads the replies that are still out, so that no server meets a reset at the end of every run. */
static void drain(int64_t until)
{
    while (any_waiting()) {
        if (now_ns() > until) {
            note_error("a request was not answered within a second after the end");
            return;
        }
        handle_events();
    }
}

static void run(void)
{
    int64_t now = now_ns();
    int64_t measure_at = now + (int64_t)(ask.warmup_seconds * 1e9);
    int64_t end_at = measure_at + (int64_t)(ask.seconds * 1e9);
    start_all();
    while ((now = now_ns()) < end_at && open_conns > 0) {
        if (!result.measuring && now >= measure_at)
            begin_measuring(now);
        handle_events();
    }
    end_measuring(now);
    drain(now + DRAIN_NS);
}

/* ---- idle mode ---------------------------------------------------------------------------------------- */

static void open_idle(void)
{
    struct timespec pause = {0, IDLE_PAUSE_NS};
    for (int i = 0; i < ask.connections; i++) {
        uint32_t source = 0x7f000201u + (uint32_t)(i / IDLE_PER_SOURCE);   /* 127.0.2.1 and on */
        conns[i].fd = new_socket(source, 0);
        if (connect(conns[i].fd, (struct sockaddr *)&ask.server, sizeof ask.server) < 0) {
            note_error("connect: %s", strerror(errno));
            close(conns[i].fd);
            conns[i].fd = -1;
        } else {
            open_conns++;
        }
        if (i % IDLE_PER_BURST == IDLE_PER_BURST - 1)
            nanosleep(&pause, NULL);
    }
}

static int count_still_open(void)
{
    int still_open = 0;
    char byte;
    for (int i = 0; i < ask.connections; i++)
        if (conns[i].fd >= 0 && recv(conns[i].fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN)
            still_open++;
    return still_open;
}

static void hold_idle(void)
{
    int64_t began = now_ns();
    char byte;
    open_idle();
    printf("{\"open\": %d, \"errors\": %llu, \"first_error\": \"%s\", \"seconds\": %.3f}\n", open_conns,
           (unsigned long long)result.errors, result.first_error, (double)(now_ns() - began) / 1e9);
    fflush(stdout);
    alarm(HOLD_SECONDS_MAX);
    while (read(STDIN_FILENO, &byte, 1) > 0)
        ;   /* only the end of it means anything; the alarm bounds the wait */
    printf("{\"still_open\": %d}\n", count_still_open());
}

/* ---- command line --------------------------------------------------------------------------------------- */

/* Reads \r, \n and \\ in place; anything else after a backslash is a mistake worth stopping for. */
static size_t unescape(char *text)
{
    char *out = text;
    for (char *in = text; *in; in++) {
        if (*in != '\\') {
            *out++ = *in;
            continue;
        }
        in++;
        if (*in != 'r' && *in != 'n' && *in != '\\')
            die("only \\r, \\n and \\\\ are known escapes");
        *out++ = *in == 'r' ? '\r' : *in == 'n' ? '\n' : '\\';
    }
    return (size_t)(out - text);
}

static char *repeated(const char *option, int times, size_t *bytes)
{
    char line[LINE_BYTES_MAX];
    if (option == NULL || *option == 0 || strlen(option) >= sizeof line)
        die("--request and --reply take 1 to %d characters", LINE_BYTES_MAX - 1);
    strcpy(line, option);
    size_t one = unescape(line);
    char *all = malloc(one * (size_t)times);
    if (all == NULL)
        die("out of memory");
    for (int i = 0; i < times; i++)
        memcpy(all + (size_t)i * one, line, one);
    *bytes = one * (size_t)times;
    return all;
}

static double number(const char *name, const char *text, double least, double most)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most))
        die("--%s takes a number from %g to %g", name, least, most);
    return value;
}

static enum mode mode_named(const char *name)
{
    static const char *const names[] = {"persistent", "connect", "paced", "idle"};
    for (int i = 0; name && i < 4; i++)
        if (strcmp(name, names[i]) == 0)
            return (enum mode)i;
    die("usage: load persistent|connect|paced|idle --port N [--host A] [--request S --reply S] "
        "[--connections N] [--depth N] [--warmup S] [--seconds S] [--connects-max N] [--rate N]");
}

static void parse(int argc, char **argv)
{
    static const struct option known[] = {
        {"host", 1, 0, 'h'},    {"port", 1, 0, 'p'},         {"request", 1, 0, 'q'}, {"reply", 1, 0, 'a'},
        {"depth", 1, 0, 'd'},   {"connections", 1, 0, 'c'},  {"warmup", 1, 0, 'w'},  {"seconds", 1, 0, 's'},
        {"rate", 1, 0, 'r'},    {"connects-max", 1, 0, 'm'}, {0, 0, 0, 0},
    };
    const char *host = "127.0.0.1", *request = NULL, *reply = NULL;
    int port = 0;
    ask.mode = mode_named(argc > 1 ? argv[1] : NULL);
    for (int option; (option = getopt_long(argc - 1, argv + 1, "", known, NULL)) != -1;) {
        switch (option) {
        case 'h': host = optarg; break;
        case 'p': port = (int)number("port", optarg, 1, 65535); break;
        case 'q': request = optarg; break;
        case 'a': reply = optarg; break;
        case 'c': ask.connections = (int)number("connections", optarg, 1, CONNECTIONS_MAX); break;
        case 'd': ask.depth = (int)number("depth", optarg, 1, DEPTH_MAX); break;
        case 'w': ask.warmup_seconds = number("warmup", optarg, 0, SECONDS_MAX); break;
        case 's': ask.seconds = number("seconds", optarg, 0.01, SECONDS_MAX); break;
        case 'm': ask.connects_max = (long)number("connects-max", optarg, 1, 1e6); break;
        case 'r': ask.rate_per_second = number("rate", optarg, 1, 1e5); break;
        default: exit(2);
        }
    }
    ask.server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (port == 0 || inet_pton(AF_INET, host, &ask.server.sin_addr) != 1)
        die("--port is required and --host is an IPv4 address");
    if ((ntohl(ask.server.sin_addr.s_addr) >> 24) != 127)
        die("only loopback addresses: this is no tool to point at anyone's network");
    if (ask.depth > 1 && ask.mode != PERSISTENT)
        die("--depth is for persistent connections");
    if (ask.mode != IDLE) {
        ask.request = repeated(request, ask.depth, &ask.request_bytes);
        ask.reply = repeated(reply, ask.depth, &ask.reply_bytes);
    }
}

static void raise_file_limit(void)
{
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < (rlim_t)ask.connections + 16)
        die("the limit on open files is %llu: too low for %d connections", (unsigned long long)files.rlim_cur,
            ask.connections);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    raise_file_limit();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    conns = calloc((size_t)ask.connections, sizeof *conns);
    if (conns == NULL || epoll_fd < 0)
        die("out of memory or files");
    for (int i = 0; i < ask.connections; i++) {
        conns[i].fd = -1;
        conns[i].source = 0x7f000101u + (uint32_t)i;   /* 127.0.1.1 and on: used in connect mode */
    }
    if (ask.mode == IDLE) {
        hold_idle();
        return 0;
    }
    run();
    print_result();
    return 0;
}
