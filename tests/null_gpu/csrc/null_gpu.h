// What the files of the null GPU share. Each file says what it stands in for; README.md beside this folder says what is real.
#ifndef NULL_GPU_H
#define NULL_GPU_H
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

// cards.c: the card that $NULLGPU names.
typedef struct {
  const char *key, *name;
  int major, minor, sms, threads_per_sm, blocks_per_sm;
  size_t memory, shared_per_sm, shared_per_block; // bytes; the last is what a kernel may opt in to
  int l2;                                         // bytes
} Card;
enum { MOST_DEVICES = 16 };
const Card *card(void);
int device_count(void);
extern __thread int current_device;

// memory.c: every range that a program may name by a pointer.
enum { HOST = 1, DEVICE = 2 };
typedef struct {
  char *start;
  size_t bytes;
  int kind, device; // kind 0: not ours
} Range;
Range find_range(const void *pointer);
enum { MOST_COPIED = 64 << 20 }; // bytes between two places of a card, beyond which a copy is not carried out
void *new_handle(void); // a number that no other object has

// streams.c: work goes to a stream when it is launched, and is done when somebody has waited for it.
void enqueue(void *stream);
void finish_stream(void *stream);

// outputs.c: what a kernel of torch leaves in memory.
typedef struct Plan Plan;
Plan *plan_of(const char *kernel); // NULL: nothing
void compute(const Plan *plan, dim3 grid, void **arguments);

// With NULLGPU_TRACE=1: a line on standard error.
void trace(const char *format, ...);

// errors.c: the calling thread's last error, which the runtime keeps until it is asked for.
cudaError_t failed(cudaError_t error);

// counts.c: read from Python with ctypes.
#define COUNTS(X) \
  X(launches) X(driver_launches) X(gemms) X(mallocs) X(frees) X(h2d) X(d2h) \
  X(stream_syncs) X(device_syncs) X(event_syncs) X(collectives)
#define DECLARE(name) extern long nullgpu_##name;
COUNTS(DECLARE)
#define COUNT(name) __sync_add_and_fetch(&nullgpu_##name, 1)
#endif
