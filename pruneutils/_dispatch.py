"""See every operation that torch runs in this thread: the base of those who count them or change what they draw."""

import threading

from torch.utils._python_dispatch import TorchDispatchMode

_lock = threading.RLock()


class Watch(TorchDispatchMode):
    """A dispatch mode that one thread uses at a time: torch notes in globals whether any is active.

    Two that overlap in other order than they are nested would leave that note set, and torch.compile would not compile
    any more.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be skipped by the compiler means to import it, which takes seconds

    def __enter__(self):
        _lock.acquire()
        return super().__enter__()

    def __exit__(self, *exception):
        try:
            return super().__exit__(*exception)
        finally:
            _lock.release()
