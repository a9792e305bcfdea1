/* The load of the broker bench: clients that keep a window of requests open, and workers that echo, on raw libzmq.
 * Of the protocol it knows where kind, attempt, epoch and id stand in frame 0; all else comes as templates on stdin.
 *
 * Usage: load PATH_OF_LIBZMQ. Lines on stdin, one JSON line on stdout for `start` and for each `run`:
 *   front URL | back URL             where clients, and where workers connect
 *   greet 0|1                        send HELLO and wait for WELCOME
 *   envelope 0|1                     workers see the asker's routing id before frame 0 and send it back
 *   client HEX | worker HEX          one peer, with frame 0 of its HELLO
 *   size BYTES HEX HEX               payload of frame 1 (0: none), frame 0 of REQUEST and of FINAL
 *   start                            connect all
 *   run SIZE WINDOW SECONDS COUNT    SIZE-th size; no new request after SECONDS, or after COUNT requests where it is not 0
 * The end of stdin ends the program.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* what of libzmq 4's stable ABI is used; declared here, so that no header is needed */
typedef struct { void *words[8]; } zmq_msg_t;
typedef struct { void *socket; int fd; short events; short revents; } zmq_pollitem_t;
enum { ZMQ_DEALER = 5, ZMQ_LINGER = 17, ZMQ_POLLIN = 1, ZMQ_DONTWAIT = 1, ZMQ_SNDMORE = 2 };
static void *(*zmq_ctx_new)(void);
static void *(*zmq_socket)(void *, int);
static int (*zmq_setsockopt)(void *, int, const void *, size_t);
static int (*zmq_connect)(void *, const char *);
static int (*zmq_poll)(zmq_pollitem_t *, int, long);
static int (*zmq_msg_init)(zmq_msg_t *);
static int (*zmq_msg_init_size)(zmq_msg_t *, size_t);
static int (*zmq_msg_init_data)(zmq_msg_t *, void *, size_t, void (*)(void *, void *), void *);
static int (*zmq_msg_close)(zmq_msg_t *);
static int (*zmq_msg_send)(zmq_msg_t *, void *, int);
static int (*zmq_msg_recv)(zmq_msg_t *, void *, int);
static int (*zmq_msg_more)(const zmq_msg_t *);
static void *(*zmq_msg_data)(zmq_msg_t *);
static size_t (*zmq_msg_size)(const zmq_msg_t *);

enum { AT_KIND = 1, AT_ATTEMPT = 4, AT_EPOCH = 8, AT_ID = 12, HEAD = 36 };
enum { HELLO = 1, WELCOME = 2, BEAT = 3, GONE = 5, REQUEST = 16, FINAL = 18, ERROR = 19 };
enum { MAX_PEERS = 64, MAX_WINDOW = 4096, MAX_SIZES = 16, BATCH = 64, POLL_MS = 500, PATIENCE = 20 };

typedef struct { unsigned char *data; size_t size; } bytes_t;
typedef struct { size_t payload; bytes_t request, final; } size_class_t;
typedef struct {
    void *socket;
    bytes_t hello;
    unsigned char epoch[4];
    uint64_t open[MAX_WINDOW]; /* counter of the request that each slot waits for, 0: none */
} peer_t;
typedef struct { uint64_t sent, answered, errors, gone, strays, open; char note[161]; } tally_t;

static peer_t clients[MAX_PEERS], workers[MAX_PEERS];
static int client_count, worker_count, size_count, greet, envelope;
static size_class_t sizes[MAX_SIZES];
static atomic_int current; /* the size class of this run */
static atomic_ullong served;
static uint64_t counter; /* of requests; never repeats, so that an answer from an earlier run is seen as a stray */
static unsigned char *payload;

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void bind_library(const char *path) {
    void *library = dlopen(path, RTLD_NOW);
    if (!library) die("cannot open libzmq: %s", dlerror());
#define BIND(name) \
    if (!(*(void **)&name = dlsym(library, #name))) die("libzmq lacks " #name)
    BIND(zmq_ctx_new); BIND(zmq_socket); BIND(zmq_setsockopt); BIND(zmq_connect); BIND(zmq_poll);
    BIND(zmq_msg_init); BIND(zmq_msg_init_size); BIND(zmq_msg_init_data); BIND(zmq_msg_close);
    BIND(zmq_msg_send); BIND(zmq_msg_recv); BIND(zmq_msg_more); BIND(zmq_msg_data); BIND(zmq_msg_size);
#undef BIND
}

static bytes_t from_hex(const char *hex) {
    bytes_t result = {malloc(strlen(hex) / 2 + 1), strlen(hex) / 2};
    for (size_t i = 0; i < result.size; i++)
        if (sscanf(hex + 2 * i, "%2hhx", &result.data[i]) != 1) die("not hexadecimal: %.20s", hex);
    if (result.size < HEAD) die("frame 0 of %zu bytes is too short", result.size);
    return result;
}

static void unowned(void *data, void *hint) { (void)data, (void)hint; }

static void send_frame(void *socket, zmq_msg_t *frame, int more) {
    if (zmq_msg_send(frame, socket, more ? ZMQ_SNDMORE : 0) < 0) die("send failed: %s", strerror(errno));
}

static void receive_rest(void *socket, zmq_msg_t *frame) {
    zmq_msg_init(frame);
    if (zmq_msg_recv(frame, socket, 0) < 0) die("receive failed: %s", strerror(errno)); /* parts come together */
}

static void *connected(void *context, const char *url) {
    int linger = 0;
    void *socket = zmq_socket(context, ZMQ_DEALER);
    if (!socket || zmq_setsockopt(socket, ZMQ_LINGER, &linger, sizeof linger) || zmq_connect(socket, url))
        die("cannot connect to %s", url);
    return socket;
}

/* HELLO, then WELCOME, whose epoch goes into all that this peer sends; anything else before it is dropped */
static void introduce(peer_t *peer, const char *url) {
    zmq_msg_t frame;
    zmq_msg_init_size(&frame, peer->hello.size);
    memcpy(zmq_msg_data(&frame), peer->hello.data, peer->hello.size);
    send_frame(peer->socket, &frame, 0);
    zmq_pollitem_t item = {peer->socket, 0, ZMQ_POLLIN, 0};
    for (;;) {
        if (zmq_poll(&item, 1, POLL_MS * PATIENCE) <= 0) die("no WELCOME from %s: is the broker there?", url);
        receive_rest(peer->socket, &frame);
        unsigned char *head = zmq_msg_data(&frame);
        int welcome = zmq_msg_size(&frame) >= HEAD && head[AT_KIND] == WELCOME;
        if (welcome) memcpy(peer->epoch, head + AT_EPOCH, 4);
        while (zmq_msg_more(&frame)) {
            zmq_msg_close(&frame);
            receive_rest(peer->socket, &frame);
        }
        zmq_msg_close(&frame);
        if (welcome) return;
    }
}

static void send_request(peer_t *client, int slot, const size_class_t *size) {
    zmq_msg_t frame;
    zmq_msg_init_size(&frame, size->request.size);
    unsigned char *head = zmq_msg_data(&frame);
    uint32_t place[2] = {(uint32_t)slot, (uint32_t)(client - clients)};
    client->open[slot] = ++counter;
    memcpy(head, size->request.data, size->request.size);
    memcpy(head + AT_EPOCH, client->epoch, 4);
    memcpy(head + AT_ID, &counter, 8);
    memcpy(head + AT_ID + 8, place, 8);
    send_frame(client->socket, &frame, size->payload > 0);
    if (size->payload) {
        zmq_msg_init_data(&frame, payload, size->payload, unowned, NULL);
        send_frame(client->socket, &frame, 0);
    }
}

/* the slot that an answer's id names, or -1 where this client has no such request open */
static int slot_of(const peer_t *client, const unsigned char *head) {
    uint64_t number;
    uint32_t place[2];
    memcpy(&number, head + AT_ID, 8);
    memcpy(place, head + AT_ID + 8, 8);
    int ours = number && place[1] == (uint32_t)(client - clients) && place[0] < MAX_WINDOW;
    return ours && client->open[place[0]] == number ? (int)place[0] : -1;
}

static void take_note(tally_t *tally, const unsigned char *head, size_t size) {
    size_t i = 0;
    if (tally->note[0]) return;
    for (; i + HEAD < size && i < sizeof tally->note - 1; i++) {
        unsigned char c = head[HEAD + i];
        tally->note[i] = c < 32 || c > 126 || c == '"' || c == '\\' ? ' ' : (char)c;
    }
    tally->note[i] = 0;
}

/* one message to a client: the slot that it ends, -1 where it ends none, -2 where nothing has come */
static int take_answer(peer_t *client, const size_class_t *size, tally_t *tally) {
    zmq_msg_t first, frame;
    size_t rest = 0;
    int slot = -1;
    zmq_msg_init(&first);
    if (zmq_msg_recv(&first, client->socket, ZMQ_DONTWAIT) < 0) return -2;
    for (int more = zmq_msg_more(&first); more;) {
        receive_rest(client->socket, &frame);
        rest += zmq_msg_size(&frame);
        more = zmq_msg_more(&frame);
        zmq_msg_close(&frame);
    }
    const unsigned char *head = zmq_msg_data(&first);
    int kind = zmq_msg_size(&first) >= HEAD ? head[AT_KIND] : 0;
    if (kind == FINAL || kind == ERROR) slot = slot_of(client, head);
    if (kind == FINAL && slot >= 0 && rest == size->payload && zmq_msg_size(&first) == size->final.size)
        tally->answered++;
    else if (kind == ERROR || kind == GONE) {
        *(kind == ERROR ? &tally->errors : &tally->gone) += 1;
        take_note(tally, head, zmq_msg_size(&first));
    } else if (kind != BEAT)
        tally->strays++;
    if (slot >= 0) {
        client->open[slot] = 0;
        tally->open--;
    }
    zmq_msg_close(&first);
    return slot;
}

/* one message to a worker; 0 where nothing has come */
static int serve(peer_t *worker) {
    zmq_msg_t asker, first, answer, frame, *lead = envelope ? &asker : &first;
    zmq_msg_init(lead);
    if (zmq_msg_recv(lead, worker->socket, ZMQ_DONTWAIT) < 0) return 0;
    if (envelope) receive_rest(worker->socket, &first);
    const unsigned char *asked = zmq_msg_data(&first);
    int request = zmq_msg_size(&first) >= HEAD && asked[AT_KIND] == REQUEST, more = zmq_msg_more(&first);
    if (request) {
        const bytes_t *final = &sizes[atomic_load(&current)].final;
        zmq_msg_init_size(&answer, final->size);
        unsigned char *head = zmq_msg_data(&answer);
        memcpy(head, final->data, final->size);
        memcpy(head + AT_ATTEMPT, asked + AT_ATTEMPT, 2);
        memcpy(head + AT_EPOCH, asked + AT_EPOCH, 4);
        memcpy(head + AT_ID, asked + AT_ID, 16);
        if (envelope) send_frame(worker->socket, &asker, 1);
        send_frame(worker->socket, &answer, more);
        atomic_fetch_add(&served, 1);
    } else if (envelope)
        zmq_msg_close(&asker);
    while (more) {
        receive_rest(worker->socket, &frame);
        more = zmq_msg_more(&frame);
        if (request) send_frame(worker->socket, &frame, more);
        else zmq_msg_close(&frame);
    }
    zmq_msg_close(&first);
    return 1;
}

static void *work(void *unused) {
    zmq_pollitem_t items[MAX_PEERS];
    for (int i = 0; i < worker_count; i++) items[i] = (zmq_pollitem_t){workers[i].socket, 0, ZMQ_POLLIN, 0};
    for (;;) {
        if (zmq_poll(items, worker_count, -1) < 0 && errno != EINTR) die("poll failed: %s", strerror(errno));
        for (int i = 0; i < worker_count; i++)
            for (int n = 0; items[i].revents && n < BATCH && serve(&workers[i]); n++) {}
    }
    return unused;
}

static void run(const size_class_t *size, int window, double seconds, uint64_t count) {
    zmq_pollitem_t items[MAX_PEERS];
    tally_t tally = {0};
    int going = 1, quiet = 0;
    double start = now(), last = start;
    atomic_store(&served, 0);
    for (int i = 0; i < client_count; i++) {
        items[i] = (zmq_pollitem_t){clients[i].socket, 0, ZMQ_POLLIN, 0};
        memset(clients[i].open, 0, sizeof clients[i].open);
        for (int n = 0; n < BATCH && take_answer(&clients[i], size, &tally) != -2; n++) {} /* beats of the pause */
    }
    for (int slot = 0; slot < window; slot++)
        for (int i = 0; i < client_count && (!count || tally.sent < count); i++, tally.sent++, tally.open++)
            send_request(&clients[i], slot, size);
    while (tally.open && quiet < PATIENCE) {
        uint64_t ended = tally.sent - tally.open;
        zmq_poll(items, client_count, POLL_MS);
        if (now() - start >= seconds) going = 0;
        for (int i = 0; i < client_count; i++)
            for (int n = 0; items[i].revents && n < BATCH; n++) {
                int slot = take_answer(&clients[i], size, &tally);
                if (slot == -2) break;
                if (slot < 0 || !going || (count && tally.sent >= count)) continue;
                send_request(&clients[i], slot, size);
                tally.sent++;
                tally.open++;
            }
        quiet = ended == tally.sent - tally.open ? quiet + 1 : 0;
        if (!quiet) last = now();
    }
    printf("{\"sent\": %llu, \"answered\": %llu, \"served\": %llu, \"errors\": %llu, \"gone\": %llu, \"strays\": %llu, "
           "\"open\": %llu, \"seconds\": %.6f, \"note\": \"%s\"}\n",
           (unsigned long long)tally.sent, (unsigned long long)tally.answered,
           (unsigned long long)atomic_load(&served), (unsigned long long)tally.errors,
           (unsigned long long)tally.gone, (unsigned long long)tally.strays, (unsigned long long)tally.open,
           last - start, tally.note);
}

static void start(const char *front, const char *back) {
    pthread_t thread;
    void *context = zmq_ctx_new();
    size_t most = 1;
    for (int i = 0; i < size_count; i++)
        if (sizes[i].payload > most) most = sizes[i].payload;
    payload = calloc(1, most);
    if (!client_count || !worker_count || !size_count || !payload) die("start needs clients, workers and sizes");
    for (int i = 0; i < worker_count; i++) workers[i].socket = connected(context, back);
    for (int i = 0; i < client_count; i++) clients[i].socket = connected(context, front);
    for (int i = 0; greet && i < worker_count; i++) introduce(&workers[i], back);
    for (int i = 0; greet && i < client_count; i++) introduce(&clients[i], front);
    if (pthread_create(&thread, NULL, work, NULL)) die("cannot start a thread");
    printf("{\"clients\": %d, \"workers\": %d}\n", client_count, worker_count);
}

static void obey(const char *line, char *front, char *back) {
    static char first[1 << 18], second[1 << 18];
    int size, window;
    double seconds;
    unsigned long long count;
    size_t bytes;
    if (sscanf(line, "front %255s", front) == 1 || sscanf(line, "back %255s", back) == 1) return;
    if (sscanf(line, "greet %d", &greet) == 1 || sscanf(line, "envelope %d", &envelope) == 1) return;
    if (sscanf(line, "client %262143s", first) == 1 && client_count < MAX_PEERS)
        clients[client_count++].hello = from_hex(first);
    else if (sscanf(line, "worker %262143s", first) == 1 && worker_count < MAX_PEERS)
        workers[worker_count++].hello = from_hex(first);
    else if (sscanf(line, "size %zu %262143s %262143s", &bytes, first, second) == 3 && size_count < MAX_SIZES)
        sizes[size_count++] = (size_class_t){bytes, from_hex(first), from_hex(second)};
    else if (!strncmp(line, "start", 5))
        start(front, back);
    else if (sscanf(line, "run %d %d %lf %llu", &size, &window, &seconds, &count) == 4 && size >= 0 &&
             size < size_count && window >= 1 && window <= MAX_WINDOW) {
        atomic_store(&current, size);
        run(&sizes[size], window, seconds, count);
    } else
        die("cannot read the line: %.60s", line);
}

int main(int argc, char **argv) {
    char front[256] = "", back[256] = "", *line = NULL;
    size_t capacity = 0;
    if (argc != 2) die("usage: load PATH_OF_LIBZMQ");
    bind_library(argv[1]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (getline(&line, &capacity, stdin) > 0) obey(line, front, back);
    _exit(0); /* the workers' thread sits in libzmq: nothing to join */
}
