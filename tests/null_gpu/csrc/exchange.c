// Messages go through one file in /dev/shm, mapped by every process of a communicator and removed once all have it, so that
// nothing is left behind by processes that are killed.
#include "exchange.h"
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
  atomic_int attached;
  atomic_long posted[MOST_RANKS], ended[MOST_RANKS];                     // rounds
  atomic_long sent[MOST_RANKS][MOST_RANKS], got[MOST_RANKS][MOST_RANKS]; // messages from one rank to another
} Header;
enum { HEADER = 1 << 20 };

struct Exchange {
  Header *header;
  char *rounds, *letters; // messages of the rounds by rank; those between two ranks by sender and receiver
  size_t bytes;
  int rank, ranks;
  long round;
  volatile int *aborted;
};

void pause_shortly(int turn) {
  if (turn < 1000) sched_yield();
  else usleep(200);
}

Exchange *attach(const char *id, int rank, int ranks, volatile int *aborted) {
  char path[200];
  snprintf(path, sizeof path, "/dev/shm/null_gpu_%s", id);
  size_t bytes = HEADER + (size_t)ranks * (ranks + 1) * MESSAGE; // of which the system gives pages that are written
  int file = open(path, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, bytes)) {
    perror(path);
    exit(2);
  }
  char *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  if (map == MAP_FAILED) {
    perror(path);
    exit(2);
  }
  Exchange *e = malloc(sizeof *e);
  *e = (Exchange){(Header *)map, map + HEADER, map + HEADER + (size_t)ranks * MESSAGE, bytes, rank, ranks, 0, aborted};
  atomic_fetch_add(&e->header->attached, 1);
  for (int turn = 0; atomic_load(&e->header->attached) < ranks; turn++) {
    if (*aborted) {
      detach(e);
      return NULL;
    }
    pause_shortly(turn);
  }
  unlink(path);
  return e;
}
void detach(Exchange *e) {
  munmap(e->header, e->bytes);
  free(e);
}

static int wait_for(Exchange *e, atomic_long *numbers, long least) {
  for (int rank = 0; rank < e->ranks; rank++)
    for (int turn = 0; atomic_load(&numbers[rank]) < least; turn++) {
      if (*e->aborted) return 0;
      pause_shortly(turn);
    }
  return 1;
}
char *begin_round(Exchange *e, const void *message, size_t bytes) {
  e->round++;
  if (!wait_for(e, e->header->ended, e->round - 1)) return NULL;
  if (bytes && bytes <= MESSAGE) memcpy(e->rounds + (size_t)e->rank * MESSAGE, message, bytes);
  atomic_store(&e->header->posted[e->rank], e->round);
  return wait_for(e, e->header->posted, e->round) ? e->rounds : NULL;
}
void end_round(Exchange *e) { atomic_store(&e->header->ended[e->rank], e->round); }

int try_send(Exchange *e, int to, const void *message, size_t bytes) {
  atomic_long *sent = &e->header->sent[e->rank][to];
  if (atomic_load(&e->header->got[e->rank][to]) < atomic_load(sent)) return 0;
  if (bytes <= MESSAGE) memcpy(e->letters + ((size_t)e->rank * e->ranks + to) * MESSAGE, message, bytes);
  atomic_fetch_add(sent, 1);
  return 1;
}
int try_receive(Exchange *e, int from, void *message, size_t bytes) {
  atomic_long *got = &e->header->got[from][e->rank];
  if (atomic_load(&e->header->sent[from][e->rank]) <= atomic_load(got)) return 0;
  if (bytes <= MESSAGE) memcpy(message, e->letters + ((size_t)from * e->ranks + e->rank) * MESSAGE, bytes);
  atomic_fetch_add(got, 1);
  return 1;
}
