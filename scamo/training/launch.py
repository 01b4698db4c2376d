"""The command line of `train.py`: started by `deepspeed` on every rank, or by plain `python` as one rank."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from scamo.config import RunConfig, load_config
from scamo.errors import ScaMoError
from scamo.training.guards import World, group_is_up, is_lost_peer, limit_threads, report_error

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "configs/quickstart.toml"
DEFAULT_DS_CONFIG = ROOT / "configs/ds_zero3.json"
# What a full disk, a quota and a limit on file sizes answer.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ScaMoError(f"{message} (see --help)")


def parser() -> argparse.ArgumentParser:
    """The arguments of train.py."""
    result = _Parser(
        prog="train.py",
        description="Train the text-prefix transformer under DeepSpeed ZeRO. "
        "Exit status: 0 finished, 2 bad input or a full disk, 13 stopped by a NaN, 128 + signal after a "
        "saved stop (SIGINT, SIGTERM, SIGUSR1).",
        epilog="Example: deepspeed --num_gpus 2 train.py --config configs/scamo_44m.toml",
    )
    result.add_argument(
        "--config",
        type=Path,
        default=DEFAULT_CONFIG,
        metavar="TOML",
        help="[data], [model] and [training]; default: configs/quickstart.toml",
    )
    result.add_argument(
        "--ds_config",
        type=Path,
        default=DEFAULT_DS_CONFIG,
        metavar="JSON",
        help='DeepSpeed configuration, "auto" is filled from --config; default: configs/ds_zero3.json',
    )
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of --config, for example --set training.steps=2000; may be repeated",
    )
    result.add_argument(
        "--resume",
        nargs="?",
        choices=["auto"],
        const="auto",
        help="continue from the newest whole checkpoint, or begin where there is none yet: the same command "
        "starts a job and, after a requeue, goes on with it; --resume alone means the same",
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing run")
    result.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run train.py. Returns the exit status (see `parser`)."""
    limit_threads()
    world = World.from_environment()
    try:
        arguments = parser().parse_args(argv)
        world = World.from_environment(arguments.local_rank)
        if arguments.resume and arguments.overwrite:
            raise ScaMoError("--resume and --overwrite exclude each other")
        if not arguments.ds_config.is_file():
            raise ScaMoError(f"{arguments.ds_config}: no such DeepSpeed configuration")
        config = load_config(RunConfig, arguments.config, arguments.set)

        from scamo.training.loop import (
            train,
        )  # torch and DeepSpeed take seconds: not before the arguments hold

        status = train(
            config,
            arguments.ds_config,
            world=world,
            resume=bool(arguments.resume),
            overwrite=arguments.overwrite,
        )
    except ScaMoError as error:
        status = report_error(str(error), world.rank, 2)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            status = report_error(str(error), world.rank, 2)
        elif is_lost_peer(error):
            status = report_error("another rank ended without a word", world.rank, 1)
        else:
            status = report_error(traceback.format_exc().rstrip(), world.rank, 1)
    if status and group_is_up():
        # The interpreter's shutdown would wait for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
