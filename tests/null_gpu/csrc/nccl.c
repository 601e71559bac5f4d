// NCCL between processes of one machine: communicators, collectives and groups of sends. Values are real for messages of at
// most 32 MB. The caller waits for the other ranks, where NCCL would only queue the work; for the stream it is pending, as
// any other work. With NULLGPU_NCCL=unreachable no communicator ever connects.
#include "null_gpu.h"
#include "exchange.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4 }; // ncclResult_t
enum { NO_COLOUR = -1 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM, AVERAGE }; // ncclRedOp_t
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, HALF, FLOAT, DOUBLE, BFLOAT16 }; // ncclDataType_t; the rest has one byte

typedef struct { char bytes[128]; } Id;
typedef struct {
  char id[100];
  int rank, ranks, splits;
  volatile int aborted;
  Exchange *exchange; // NULL for one rank
} Comm;

static size_t size_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type <= BFLOAT16 ? sizes[type] : 1;
}

static int connect_ranks(Comm **out, const char *id, int rank, int ranks) {
  if (ranks > MOST_RANKS) return INVALID_ARGUMENT;
  Comm *c = calloc(1, sizeof *c);
  snprintf(c->id, sizeof c->id, "%s", id);
  c->rank = rank, c->ranks = ranks;
  *out = c; // at once, so that another thread can abort it
  const char *mode = getenv("NULLGPU_NCCL");
  int unreachable = mode && !strcmp(mode, "unreachable");
  for (int turn = 0; unreachable && ranks > 1 && !c->aborted; turn++) pause_shortly(turn);
  if (ranks > 1 && !c->aborted) c->exchange = attach(c->id, rank, ranks, &c->aborted);
  return c->aborted ? SYSTEM_ERROR : SUCCESS;
}

API int ncclGetVersion(int *version) { *version = 22907; return SUCCESS; }
API const char *ncclGetErrorString(int error) { return error ? "error of the null GPU's NCCL" : "no error"; }
API const char *ncclGetLastError(void *comm) { return ""; }
API int ncclGetUniqueId(Id *id) {
  uint64_t random[2];
  if (getrandom(random, sizeof random, 0) != sizeof random) return SYSTEM_ERROR;
  memset(id, 0, sizeof *id);
  snprintf(id->bytes, sizeof id->bytes, "%016lx%016lx", random[0], random[1]);
  return SUCCESS;
}
API int ncclCommInitRank(Comm **comm, int ranks, Id id, int rank) { return connect_ranks(comm, id.bytes, rank, ranks); }
API int ncclCommInitRankConfig(Comm **comm, int ranks, Id id, int rank, void *config) { return connect_ranks(comm, id.bytes, rank, ranks); }
API int ncclCommInitRankScalable(Comm **comm, int ranks, int rank, int ids, Id *id, void *config) {
  return connect_ranks(comm, id->bytes, rank, ranks);
}
API int ncclCommSplit(Comm *c, int colour, int key, Comm **out, void *config) {
  int mine[2] = {colour, key}, rank = 0, ranks = 0;
  *out = NULL;
  c->splits++;
  if (c->exchange) {
    char *all = begin_round(c->exchange, mine, sizeof mine);
    if (!all) return SYSTEM_ERROR;
    for (int other = 0; other < c->ranks; other++) {
      int theirs[2];
      memcpy(theirs, all + (size_t)other * MESSAGE, sizeof theirs);
      if (theirs[0] != colour) continue;
      ranks++;
      rank += theirs[1] < key || (theirs[1] == key && other < c->rank);
    }
    end_round(c->exchange);
  } else ranks = 1;
  if (colour == NO_COLOUR) return SUCCESS;
  char id[100];
  snprintf(id, sizeof id, "%.80s_%d_%d", c->id, c->splits, colour);
  return connect_ranks(out, id, rank, ranks);
}
API int ncclCommAbort(Comm *c) { // its memory stays, as another thread may still wait in a call
  if (c) c->aborted = 1;
  return SUCCESS;
}
API int ncclCommDestroy(Comm *c) {
  if (c->exchange) detach(c->exchange);
  free(c);
  return SUCCESS;
}
API int ncclCommGetAsyncError(Comm *c, int *error) { *error = SUCCESS; return SUCCESS; }
API int ncclCommCount(Comm *c, int *ranks) { *ranks = c->ranks; return SUCCESS; }
API int ncclCommUserRank(Comm *c, int *rank) { *rank = c->rank; return SUCCESS; }
API int ncclCommMemStats(Comm *c, int which, uint64_t *bytes) { *bytes = 0; return SUCCESS; }

// --- reductions

static float from_bfloat16(uint16_t value) {
  union { uint32_t bits; float number; } u = {(uint32_t)value << 16};
  return u.number;
}
static uint16_t to_bfloat16(float value) { // to nearest even
  union { float number; uint32_t bits; } u = {value};
  if (value != value) return 0x7fc0;
  return (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
}
#define REDUCED(x, y) (op == PRODUCT ? (x) * (y) : op == MAXIMUM ? ((x) > (y) ? (x) : (y)) : op == MINIMUM ? ((x) < (y) ? (x) : (y)) : (x) + (y))
#define EACH(T) for (size_t i = 0; i < count; i++) ((T *)into)[i] = REDUCED(((T *)into)[i], ((const T *)from)[i]); break
static void reduce(void *into, const void *from, size_t count, int type, int op) {
  switch (type) {
    case INT8: EACH(int8_t);
    case UINT8: EACH(uint8_t);
    case INT32: EACH(int32_t);
    case UINT32: EACH(uint32_t);
    case INT64: EACH(int64_t);
    case UINT64: EACH(uint64_t);
    case HALF: EACH(_Float16);
    case FLOAT: EACH(float);
    case DOUBLE: EACH(double);
    case BFLOAT16:
      for (size_t i = 0; i < count; i++) {
        float x = from_bfloat16(((uint16_t *)into)[i]), y = from_bfloat16(((const uint16_t *)from)[i]);
        ((uint16_t *)into)[i] = to_bfloat16(REDUCED(x, y));
      }
  }
}
#define DIVIDE(T) for (size_t i = 0; i < count; i++) ((T *)values)[i] /= ranks; break
static void divide(void *values, size_t count, int type, int ranks) {
  switch (type) {
    case INT32: DIVIDE(int32_t);
    case INT64: DIVIDE(int64_t);
    case HALF: DIVIDE(_Float16);
    case FLOAT: DIVIDE(float);
    case DOUBLE: DIVIDE(double);
    case BFLOAT16:
      for (size_t i = 0; i < count; i++) ((uint16_t *)values)[i] = to_bfloat16(from_bfloat16(((uint16_t *)values)[i]) / ranks);
  }
}
// The reduction over ranks of `count` values that begin `offset` bytes into each rank's message.
static void reduce_all(Comm *c, void *into, const char *all, size_t offset, size_t count, int type, int op) {
  memcpy(into, all + offset, count * size_of(type));
  for (int rank = 1; rank < c->ranks; rank++) reduce(into, all + (size_t)rank * MESSAGE + offset, count, type, op);
  if (op == AVERAGE) divide(into, count, type, c->ranks);
}

// --- collectives

// A round of all ranks, each with `bytes`; `all` is NULL where nothing arrives, as it is too long.
#define ROUND(send, bytes, action) \
  do { \
    COUNT(collectives); \
    enqueue(stream); \
    char *all = begin_round(c->exchange, send, bytes); \
    if (!all) return SYSTEM_ERROR; \
    if ((bytes) <= MESSAGE) action; \
    end_round(c->exchange); \
    return SUCCESS; \
  } while (0)
static int alone(const void *send, void *receive, size_t bytes, void *stream) {
  COUNT(collectives);
  enqueue(stream);
  if (send != receive && bytes <= MESSAGE) memmove(receive, send, bytes);
  return SUCCESS;
}

API int ncclAllGather(const void *send, void *receive, size_t count, int type, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, bytes, for (int rank = 0; rank < c->ranks; rank++) memcpy((char *)receive + rank * bytes, all + (size_t)rank * MESSAGE, bytes));
}
API int ncclAllReduce(const void *send, void *receive, size_t count, int type, int op, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, bytes, reduce_all(c, receive, all, 0, count, type, op));
}
API int ncclReduce(const void *send, void *receive, size_t count, int type, int op, int root, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, bytes, if (c->rank == root) reduce_all(c, receive, all, 0, count, type, op));
}
API int ncclReduceScatter(const void *send, void *receive, size_t count, int type, int op, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, bytes * c->ranks, reduce_all(c, receive, all, c->rank * bytes, count, type, op));
}
API int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, c->rank == root ? bytes : 0, if (bytes <= MESSAGE) memmove(receive, all + (size_t)root * MESSAGE, bytes));
}
API int ncclBcast(void *buffer, size_t count, int type, int root, Comm *c, void *stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, c, stream);
}
API int ncclAlltoAll(const void *send, void *receive, size_t count, int type, Comm *c, void *stream) {
  size_t bytes = count * size_of(type);
  if (!c->exchange) return alone(send, receive, bytes, stream);
  ROUND(send, bytes * c->ranks,
        for (int rank = 0; rank < c->ranks; rank++) memcpy((char *)receive + rank * bytes, all + (size_t)rank * MESSAGE + c->rank * bytes, bytes));
}

// --- groups of sends and receives, tried in turn until all are done

enum { MOST_LETTERS = 1024 };
typedef struct {
  Comm *comm;
  void *buffer;
  size_t bytes;
  int peer, sends, done;
} Letter;
static __thread Letter letters[MOST_LETTERS];
static __thread int open_groups, waiting;

static int deliver(void) {
  for (int turn = 0, left = waiting; left; turn++) {
    for (int i = 0; i < waiting; i++) {
      Letter *l = &letters[i];
      if (l->done) continue;
      if (l->comm->aborted) {
        waiting = 0;
        return SYSTEM_ERROR;
      }
      // Messages between the same ranks keep their order.
      int earlier = 0;
      for (int j = 0; j < i; j++)
        earlier |= !letters[j].done && letters[j].comm == l->comm && letters[j].peer == l->peer && letters[j].sends == l->sends;
      if (earlier) continue;
      Exchange *e = l->comm->exchange;
      l->done = l->sends ? try_send(e, l->peer, l->buffer, l->bytes) : try_receive(e, l->peer, l->buffer, l->bytes);
      left -= l->done;
    }
    if (left) pause_shortly(turn);
  }
  waiting = 0;
  return SUCCESS;
}
API int ncclGroupStart(void) { open_groups++; return SUCCESS; }
API int ncclGroupEnd(void) { return --open_groups ? SUCCESS : deliver(); }

static int add_letter(Comm *c, void *buffer, size_t bytes, int peer, int sends, void *stream) {
  if (!c->exchange || waiting == MOST_LETTERS) return INVALID_ARGUMENT;
  COUNT(collectives);
  enqueue(stream);
  letters[waiting++] = (Letter){c, buffer, bytes, peer, sends, 0};
  return open_groups ? SUCCESS : deliver();
}
API int ncclSend(const void *buffer, size_t count, int type, int peer, Comm *c, void *stream) {
  return add_letter(c, (void *)buffer, count * size_of(type), peer, 1, stream);
}
API int ncclRecv(void *buffer, size_t count, int type, int peer, Comm *c, void *stream) {
  return add_letter(c, buffer, count * size_of(type), peer, 0, stream);
}
