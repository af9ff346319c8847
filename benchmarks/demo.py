"""The main job in one command: a cloud on localhost, an edge that talks to it, both gone at the end.

``python -m benchmarks.demo [--model M] [--dtype D] generate|chat [arguments of privatelora-edge]``
starts the two processes exactly as two people on two machines would. The cloud is stopped however
this ends: normally, by an error, by Ctrl-C or by SIGTERM.
"""

import argparse
import signal
import subprocess
import sys
from types import FrameType

from benchmarks.processes import ROOT, CloudProcess, ProcessError, child_environment, edge_command


def _end_on_sigterm(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that the cloud is stopped on the way out."""
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def main() -> int:
    """Run the demo and return the edge's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model that the cloud serves")
    parser.add_argument("--dtype", default="float32", help="the cloud's compute dtype")
    parser.add_argument("edge", nargs=argparse.REMAINDER, help="generate or chat, with further arguments")
    options = parser.parse_args()
    command, *rest = options.edge or ["generate", "--prompt", "What is the capital of France?"]
    signal.signal(signal.SIGTERM, _end_on_sigterm)

    _say(f"starting a cloud process with {options.model} ({options.dtype}) ...")
    try:
        with CloudProcess(options.model, options.dtype) as cloud:
            _say(f"cloud   process {cloud.pid} at {cloud.address}: decoder layers, A, B, KV cache")
            _say("edge    this terminal: text, tokenizer, embeddings, head, M, decoding loop")
            _say(f"running privatelora-edge {command} --cloud {cloud.address}\n")
            edge = subprocess.Popen(
                edge_command(command, "--cloud", cloud.address, *rest), cwd=ROOT, env=child_environment()
            )
            while True:
                try:
                    status = edge.wait()
                    break
                except KeyboardInterrupt:
                    continue  # the terminal sent Ctrl-C to the edge too, and the edge decides what it means
                except SystemExit:
                    edge.terminate()
                    edge.wait()
                    raise
    except ProcessError as error:
        print(f"[demo] {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("[demo] interrupted before the cloud was ready", file=sys.stderr)
        return 130
    _say(f"cloud stopped; the edge ended with status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
