"""All threads of a cloud take memory from one heap, or what they free adds up."""

import os
import subprocess
import sys
import tempfile

import pytest

PROGRAM = """
import asyncio, ctypes, sys, threading

import cloud_server.server as server
from cloud_server.config.cloud import CloudConfig

def heaps():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
    assert libc.malloc_info(0, file) == 0
    libc.fclose(file)
    return open(sys.argv[1]).read().count("<heap ")

def build_service(*_, **__):
    before, together = heaps(), threading.Barrier(6)

    def take():
        kept = [bytes(4096) for _ in range(100)]
        together.wait()

    threads = [threading.Thread(target=take) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print("more heaps:", heaps() - before)
    raise SystemExit

server.build_service = build_service
asyncio.run(server.serve(CloudConfig(listen="127.0.0.1:0"), print))
"""


def more_heaps(**environment: str) -> str:
    known = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    with tempfile.NamedTemporaryFile() as file:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, file.name],
            env=known | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "more heaps: " in done.stdout, done.stderr
    return done.stdout.strip().removeprefix("more heaps: ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc gives each thread a heap")
def test_threads_of_a_cloud_share_one_heap() -> None:
    assert more_heaps() == "0"
    assert more_heaps(MALLOC_ARENA_MAX="4") != "0", "whoever runs it decides"
