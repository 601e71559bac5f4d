// Streams and events. Everything is carried out when it is launched, but counts as done only when somebody has waited for it,
// as a program must not rely on more: torch's allocator then keeps what other streams may still read, and pinned memory that
// a copy may still read. A card that runs behind its host does the same; one that keeps up needs less memory. So an event is
// pending until
// - its stream, an event recorded later on it, a stream that waits for it, or the device is synchronised;
// - or 1,024 further launches went to its stream, as a host cannot run further ahead of a card;
// - or it was asked for 100,000 times, so that a loop that polls it ends.
// With NULLGPU_EVENTS=done every event is done at once.
// What a captured graph holds is carried out while it is captured, and not again when the graph is launched.
#include "null_gpu.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_AHEAD = 1024, MOST_ASKED = 100000 };

typedef struct Stream {
  struct Stream *next;
  void *handle;
  int device;
  long launched, done;       // numbers of pieces of work
  struct Waits *waits;       // for other streams
  long capture;              // the number of the graph that it is captured to; 0: none
} Stream;
typedef struct Waits {
  struct Waits *next;
  long since, until;         // work after `since` runs after `other` has done its `until`
  Stream *other;
} Waits;
typedef struct {
  Stream *stream;            // NULL: never recorded
  long number;               // the last piece of work before it
  long asked;
  double milliseconds;       // when it was recorded
  long capture;              // of its stream then
} Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Stream *streams;

void *new_handle(void) {
  static uintptr_t last = 0x1000;
  return (void *)__sync_add_and_fetch(&last, 16);
}

static int all_done(void) {
  static int known = -1;
  if (known < 0) {
    const char *mode = getenv("NULLGPU_EVENTS");
    known = mode && !strcmp(mode, "done");
  }
  return known;
}

// A handle is of one device, but for the default streams' small numbers. Call with the lock.
static Stream *stream_of(void *handle) {
  int shared = (uintptr_t)handle < 0x1000;
  for (Stream *s = streams; s; s = s->next)
    if (s->handle == handle && (!shared || s->device == current_device)) return s;
  Stream *s = calloc(1, sizeof *s);
  *s = (Stream){streams, handle, current_device};
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
  s->launched++;
  finish(s, s->launched - MOST_AHEAD);
  pthread_mutex_unlock(&lock);
}
void finish_stream(void *handle) {
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(handle);
  finish(s, s->launched);
  pthread_mutex_unlock(&lock);
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = new_handle();
  pthread_mutex_lock(&lock);
  stream_of(*stream);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
static long capture_of(cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  long capture = stream_of(stream)->capture;
  pthread_mutex_unlock(&lock);
  return capture;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  if (status) cudaStreamIsCapturing(stream, status);
  if (id) *id = capture_of(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  static long last = 0;
  pthread_mutex_lock(&lock);
  stream_of(stream)->capture = ++last;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  pthread_mutex_lock(&lock);
  long capture = stream_of(stream)->capture;
  for (Stream *s = streams; s; s = s->next)
    if (s->capture == capture) s->capture = 0;
  pthread_mutex_unlock(&lock);
  *graph = new_handle();
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = 1; // of an empty graph torch warns
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *runnable, cudaGraph_t graph, unsigned long long flags) {
  *runnable = new_handle();
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *runnable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(runnable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t runnable, cudaStream_t stream) {
  COUNT(launches);
  enqueue(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  COUNT(stream_syncs);
  finish_stream(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(stream);
  int done = all_done() || s->done >= s->launched;
  pthread_mutex_unlock(&lock);
  return done ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaDeviceSynchronize(void) {
  COUNT(device_syncs);
  pthread_mutex_lock(&lock);
  for (Stream *s = streams; s; s = s->next)
    if (s->device == current_device) finish(s, s->launched);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(stream);
  *(Event *)event = (Event){s, s->launched, 0, now.tv_sec * 1e3 + now.tv_nsec / 1e6, s->capture};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  if (e->stream && ++e->asked > MOST_ASKED) finish(e->stream, e->number);
  int done = all_done() || !e->stream || e->stream->done >= e->number;
  pthread_mutex_unlock(&lock);
  return done ? cudaSuccess : cudaErrorNotReady; // which is not kept as the last error
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  COUNT(event_syncs);
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  if (e->stream) finish(e->stream, e->number);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
// The host's time between the records, as nothing here takes a card's time.
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = ((Event *)end)->milliseconds - ((Event *)start)->milliseconds;
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  Event *e = (Event *)event;
  pthread_mutex_lock(&lock);
  Stream *s = stream_of(stream);
  if (e->capture && e->capture == e->stream->capture) s->capture = e->capture;
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
