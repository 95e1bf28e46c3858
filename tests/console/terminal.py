"""A program on a pseudo-terminal: what it shows, and what is typed."""

import os
import pty
import select
import subprocess
import time

SECONDS = 40.0


class Typed:
    """Runs `words` on a terminal of its own; a context manager that ends it."""

    def __init__(self, words, environment=None, cwd=None):
        self.ours, theirs = pty.openpty()
        more = {"TERM": "dumb", **(environment or {})}
        self.process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **more},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""
        self.read_to = 0

    def type(self, text):
        os.write(self.ours, text.encode())

    def wait_for(self, text, seconds=SECONDS):
        """What came since the last wait, up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.shown[self.read_to :]:
            if time.monotonic() > end:
                raise AssertionError(f"{text!r} did not come; there is {self.shown!r}")
            if not self.read(0.2) and self.process.poll() is not None and not self.read(0.2):
                raise AssertionError(f"ended without {text!r}: {self.shown!r}")
        start, self.read_to = self.read_to, self.shown.index(text, self.read_to) + len(text)
        return self.shown[start : self.read_to]

    def interrupt(self, text, times=8):
        """Ctrl-C, and again until `text` comes: readline misses one that finds it between waits."""
        for _ in range(times):
            self.type("\x03")
            end = time.monotonic() + SECONDS / times
            while time.monotonic() < end:
                self.read(0.2)
                if text in self.shown[self.read_to :]:
                    return self.wait_for(text)
        raise AssertionError(f"{text!r} did not come; there is {self.shown!r}")

    def exit_code(self):
        while self.process.poll() is None:
            self.read(0.1)
        while self.read(0.1):
            pass
        return self.process.returncode

    def read(self, seconds):
        """Whether something came within so many seconds."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        try:
            self.shown += os.read(self.ours, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            return False
        return True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
