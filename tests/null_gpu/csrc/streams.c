// Streams and events. Everything is carried out when it is launched, but counts as done only when somebody has waited for it:
// torch's allocator then keeps what other streams may still read, as with a GPU that runs behind its host. An event is pending
// until its stream, a later event, a stream that waits for it, or the device is synchronised; or 1,024 further launches went to
// its stream; or it was asked for 100,000 times.
#include "null_gpu.h"
#include <stdlib.h>

enum { MOST_AHEAD = 1024, MOST_ASKED = 100000 };

typedef struct Stream Stream;
typedef struct Waits {
  struct Waits *next;
  long since, until;         // work after `since` runs after `other` has done its `until`
  Stream *other;
} Waits;
struct Stream {
  Stream *next;
  void *handle;
  long launched, done;       // numbers of pieces of work
  Waits *waits;              // for other streams
};
typedef struct {
  Stream *stream;            // NULL: never recorded
  long number, asked;        // the last piece of work before it
} Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Stream *streams;

static Stream *stream_of(void *handle) { // call with the lock
  for (Stream *s = streams; s; s = s->next)
    if (s->handle == handle) return s;
  Stream *s = calloc(1, sizeof *s);
  *s = (Stream){streams, handle};
  return streams = s;
}

static void finish(Stream *s, long number) {
  if (s->done >= number) return;
  s->done = number;
  for (Waits **at = &s->waits; *at;) {
    Waits *w = *at;
    if (w->since >= number) { at = &w->next; continue; }
    Stream *other = w->other;
    long until = w->until;
    *at = w->next;
    free(w);
    finish(other, until);
    at = &s->waits; // the list may have changed below
  }
}

void enqueue(void *handle) {
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(handle);
  finish(s, ++s->launched - MOST_AHEAD);
  pthread_mutex_unlock(&lock);
}
void finish_stream(void *handle) {
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(handle);
  finish(s, s->launched);
  pthread_mutex_unlock(&lock);
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = new_handle(); return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { finish_stream(stream); return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize(void) {
  pthread_mutex_lock(&lock);
  for (Stream *s = streams; s; s = s->next) finish(s, s->launched);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = calloc(1, sizeof(Event)); return cudaSuccess; }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(stream);
  *(Event *)event = (Event){s, s->launched};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  if (e->stream && ++e->asked > MOST_ASKED) finish(e->stream, e->number);
  int done = !e->stream || e->stream->done >= e->number;
  pthread_mutex_unlock(&lock);
  return done ? cudaSuccess : cudaErrorNotReady; // which is not kept as the last error
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  if (e->stream) finish(e->stream, e->number);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(stream);
  if (e->stream && e->stream != s && e->stream->done < e->number) {
    Waits *w = s->waits;
    while (w && w->other != e->stream) w = w->next;
    if (!w) {
      w = calloc(1, sizeof *w);
      w->next = s->waits, w->other = e->stream;
      s->waits = w;
    }
    w->since = s->launched, w->until = e->number; // an earlier wait for the same stream is included
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
