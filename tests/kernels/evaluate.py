"""Call a public op and its backward; as a script, do so for pickled requests under the Triton interpreter.

The interpreter needs a process of its own: Triton reads TRITON_INTERPRET when it is imported, and other tests
of the same run may have imported it by then.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import scamo_kernels
import torch


def evaluate(
    op: str, arguments: Sequence[Any], keywords: dict[str, Any], differentiate: Sequence[int], cotangent: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and the gradients of the arguments at `differentiate` for the first output's cotangent.

    Every uninitialised tensor is filled with NaN, so that what a kernel forgets to write shows.
    """
    arguments = list(arguments)
    for i in differentiate:
        arguments[i] = arguments[i].detach().requires_grad_()
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            outputs = getattr(scamo_kernels, op)(*arguments, **keywords)
            outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
            grads = []
            if differentiate:
                grads = list(
                    torch.autograd.grad(outputs[0], [arguments[i] for i in differentiate], cotangent)
                )
        finally:
            torch.use_deterministic_algorithms(before)
    return [x.detach() for x in outputs], grads


def set_tiles(forward: Sequence[int], backward: Sequence[int]) -> None:
    """Run the interpreter with other tiles than its own."""
    from scamo_kernels import _attention_triton as kernels

    kernels.INTERPRETER = kernels.ForwardConfig(*forward), kernels.BackwardConfig(*backward)


def main() -> None:
    torch.set_num_threads(1)
    # Whatever else prints must not get between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, {"evaluate": evaluate, "set_tiles": set_tiles}[function](*arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
