// Messages between the processes of one communicator, on one machine.
#ifndef EXCHANGE_H
#define EXCHANGE_H
#include <stddef.h>

enum { MOST_RANKS = 64, MESSAGE = 32 << 20 }; // bytes that one message carries; what is longer arrives as nothing

typedef struct Exchange Exchange;
// Waits until all ranks have come. NULL if `*aborted` was set meanwhile.
Exchange *attach(const char *id, int rank, int ranks, volatile int *aborted);
void detach(Exchange *exchange);

// A round that every rank takes part in: each posts `bytes` and sees what all posted. Returns the address of rank 0's
// message; that of rank r lies r * MESSAGE further; NULL if aborted. `end_round` lets the next one begin.
char *begin_round(Exchange *exchange, const void *message, size_t bytes);
void end_round(Exchange *exchange);

// Between two ranks: 1 if it was done, 0 if it has to be tried again.
int try_send(Exchange *exchange, int to, const void *message, size_t bytes);
int try_receive(Exchange *exchange, int from, void *message, size_t bytes);
void pause_shortly(int turn); // between two tries
#endif
