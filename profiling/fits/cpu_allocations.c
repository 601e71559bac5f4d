// Counts what PyTorch's CPU allocator takes below torch: each posix_memalign by who called it, libc10 or another library
// (oneDNN), and its free. Loaded by LD_PRELOAD; `on_cpu.py` calls `counting_begins` and reads the counts.
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { C10, OTHERS, CALLERS };
enum { SLOTS = 1 << 20, ALIGNED = 64 }; // ALIGNED: what both ask for, at least

typedef struct {
  uintptr_t address; // 0: free
  size_t bytes;
  int caller;
} Block;

extern void *__libc_memalign(size_t alignment, size_t bytes);
extern void __libc_free(void *pointer);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block blocks[SLOTS]; // by hash of the address, at the next free slot
static int counting;
static uintptr_t c10_begin, c10_end;
static size_t live[CALLERS];
size_t peaks[CALLERS];
size_t others_then; // bytes of the others at the peak of libc10

static size_t slot_of(uintptr_t address) { return address / ALIGNED * 0x9E3779B97F4A7C15u >> 44; }

static int find_c10(struct dl_phdr_info *library, size_t size, void *unused) {
  const char *name = strrchr(library->dlpi_name, '/');
  if (!name || strcmp(name, "/libc10.so")) return 0;
  for (int i = 0; i < library->dlpi_phnum; i++) {
    const ElfW(Phdr) *part = &library->dlpi_phdr[i];
    uintptr_t begin = library->dlpi_addr + part->p_vaddr;
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    c10_begin = begin, c10_end = begin + part->p_memsz;
  }
  return 1;
}

// Count from now on; -1 if libc10 is not loaded.
int counting_begins(void) {
  dl_iterate_phdr(find_c10, NULL);
  counting = c10_end > 0;
  return counting ? 0 : -1;
}

static void add(uintptr_t address, size_t bytes, int caller) {
  pthread_mutex_lock(&lock);
  size_t slot = slot_of(address);
  while (blocks[slot].address) slot = (slot + 1) % SLOTS;
  blocks[slot] = (Block){address, bytes, caller};
  live[caller] += bytes;
  if (live[caller] > peaks[caller]) {
    peaks[caller] = live[caller];
    if (caller == C10) others_then = live[OTHERS];
  }
  pthread_mutex_unlock(&lock);
}

static void drop(uintptr_t address) {
  pthread_mutex_lock(&lock);
  size_t slot = slot_of(address);
  while (blocks[slot].address && blocks[slot].address != address) slot = (slot + 1) % SLOTS;
  if (blocks[slot].address) {
    live[blocks[slot].caller] -= blocks[slot].bytes;
    blocks[slot].address = 0;
    // Those that had found this slot taken are put in anew.
    for (size_t next = (slot + 1) % SLOTS; blocks[next].address; next = (next + 1) % SLOTS) {
      Block moved = blocks[next];
      blocks[next].address = 0;
      size_t to = slot_of(moved.address);
      while (blocks[to].address) to = (to + 1) % SLOTS;
      blocks[to] = moved;
    }
  }
  pthread_mutex_unlock(&lock);
}

int posix_memalign(void **pointer, size_t alignment, size_t bytes) {
  void *given = __libc_memalign(alignment, bytes);
  if (!given) return ENOMEM;
  *pointer = given;
  if (counting) {
    uintptr_t from = (uintptr_t)__builtin_return_address(0);
    add((uintptr_t)given, bytes, from >= c10_begin && from < c10_end ? C10 : OTHERS);
  }
  return 0;
}

void free(void *pointer) {
  if (pointer && counting && (uintptr_t)pointer % ALIGNED == 0) drop((uintptr_t)pointer);
  __libc_free(pointer);
}
