"""After something went wrong: the queue, the pages and the requests as if the step had never been planned.

A request's tokens are known to the host and survive; what may be lost is their keys in the cache, which are computed
again as after a preemption.  Works on a Scheduler's books, as one of its friends.
"""

import logging

from jaxserve.engine.request import Output, Request

log = logging.getLogger("jaxserve")
RECOVERIES = 2  # times that the steps of one request may be lost before it fails


def undo(scheduler, plans):
    """Takes back the newest plans, the oldest of them first, whose tokens were never drawn.

    All steps before them have been read, or will be.  Streams stand where they stood, prompts return to the queue.
    """
    size, back = scheduler.pool.size, list[Request]()
    for chunk in (chunk for plan in reversed(plans) for chunk in plan):
        request, first = chunk.request, chunk.start // size
        if request.finish:
            continue
        request.in_flight -= chunk.emits
        if request.lane < 0 or request in back:
            continue  # it computes everything again
        request.computed = chunk.start
        # Who is younger than one that goes back does so too: it may have been promised what that one was to write.
        if not back and chunk.stop - chunk.start == (chunk.emits or 1) and request.chained <= first:
            kept = -(-chunk.start // size)
            scheduler.pool.release(request.pages[kept:])
            del request.pages[kept:]
        else:
            # The pages from here on were promised to others, who got them in the same plan.
            scheduler.pool.forget(request.pages[first:])
            request.chain = None
            back.append(request)
    requeue(scheduler, back)


def restart(scheduler, message, guilty=()):
    """The device has lost its state, and every token that the host has not seen.

    Who runs returns to the front of the queue; those that are `guilty`, or lose their steps once too often, fail.
    """
    scheduler.pool.forget(list(scheduler.pool.entry_of))
    for request in [*scheduler.running, *scheduler.waiting]:
        request.in_flight = 0  # it will be sampled again
    back = []
    for request in list(scheduler.running):
        request.chain = None
        if request in guilty or request.recoveries == RECOVERIES:
            safely(scheduler.fail, request, message)
        else:
            request.recoveries += 1
            back.append(request)
    requeue(scheduler, back)
    return len(back)


def requeue(scheduler, requests):
    """Puts running requests at the front of the queue, in their order."""
    chosen = set(requests)
    for request in reversed([r for r in scheduler.running if r in chosen]):
        scheduler._leave(request)
        request.preemptions += 1
        scheduler.waiting[request] = None
        scheduler.waiting.move_to_end(request, last=False)


def complete(scheduler, request):
    """Ends a request whose answer is complete without another token."""
    if not request.finish:
        scheduler._end(request, Output(None, "stop"))


def commit(scheduler, chunks, tokens, logprobs, tops, step=0):
    """Scheduler.commit; a request whose outbox raises ends alone, and the others get their tokens."""
    at = 0
    while at < len(chunks):
        rest = [None if part is None else part[at:] for part in (logprobs, tops)]
        try:
            return scheduler.commit(chunks[at:], tokens[at:], *rest, step)
        except Exception:
            # The last one that was recorded is it.
            told = [len(c.request.tokens) - c.stop + c.emits for c in chunks]  # of the chunk, and one
            recorded = [i for i, c in enumerate(chunks) if c.emits > step and told[i] > step + 1]
            if not recorded or recorded[-1] < at:
                raise
            log.exception("the outbox of a request failed")
            drop(scheduler, chunks[recorded[-1]].request)
            at = recorded[-1] + 1


def safely(action, *subjects):
    """Ends a request; what its outbox makes of it is no other's concern."""
    try:
        action(*subjects)
    except Exception:
        log.exception("the outbox of a request failed")


def drop(scheduler, request):
    """Ends a request that nobody can be told of."""
    request.outbox = None
    scheduler.fail(request, "its outbox failed")
