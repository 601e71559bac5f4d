// What the files of the null GPU share. README.md beside this folder says what is real.
#ifndef NULL_GPU_H
#define NULL_GPU_H
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

// device.c: the GPU that $NULLGPU describes, and every range that a program may name by a pointer.
typedef struct {
  char name[64];
  int major, minor, sms, threads_per_sm;
  size_t shared_per_block, memory; // bytes; the first is what a kernel may opt in to
} Card;
const Card *card(void);
enum { HOST = 1, DEVICE = 2 };
typedef struct {
  char *start;
  size_t bytes;
  int kind; // 0: not ours
} Range;
Range find_range(const void *pointer);
void *new_handle(void); // a number that no other object has
cudaError_t failed(cudaError_t error); // the calling thread's last error, which the runtime keeps until it is asked for

// streams.c: work goes to a stream when it is launched, and is done when somebody has waited for it.
void enqueue(void *stream);
void finish_stream(void *stream);
#endif
