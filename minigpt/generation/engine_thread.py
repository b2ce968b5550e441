"""A thread that drives an engine, so that others can wait for tokens: what a server's handlers need.

    with Background(Engine(model)) as engine:
        handle = engine.submit(prompt, options)      # from any thread
        for token in handle: ...

One thread, however many requests. It sleeps while there is nothing to do.
"""

import threading
from types import TracebackType

from minigpt.generation.engine import Engine

__all__ = ["Background"]


class Background:
    """Drives an engine between `with` and its end, which cancels what is not finished, and closes the engine.

    If a step fails, all requests end with its error, and no more are taken.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_closing = False
        self._thread = threading.Thread(target=self._drive, name="minigpt engine", daemon=True)

    def __enter__(self) -> Engine:
        assert not self._engine.is_driven, "one thread drives an engine"
        self._engine.is_driven = True
        self._thread.start()
        return self._engine

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._engine.changed:
            self._is_closing = True
            self._engine.changed.notify_all()
        self._thread.join()
        self._engine.is_driven = False

    def _drive(self) -> None:
        engine = self._engine
        try:
            while True:
                with engine.changed:
                    engine.changed.wait_for(lambda: self._is_closing or not engine.is_idle)
                if self._is_closing:
                    engine.close()
                    return
                engine.step()
        except Exception as error:
            engine.fail(error)
