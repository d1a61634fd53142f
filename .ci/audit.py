"""Audit the built libraries: ABI, instruction sets, spills, SASS.  Needs no GPU.

usage: python .ci/audit.py [package folder]
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = {"sm_80", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"}
# Architecture -> kernel name fragment -> SASS that shows its fast path: 16-byte loads and stores,
# tensor cores fed by asynchronous copies.
FAST_PATH = {
    "sm_90": {
        "rms_norm_fwd_kernel": (r"LDG\.E\.128", r"STG\.E\.128"),
        "rms_norm_bwd_kernel": (r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.128"),
        "mla_attention_keys_kernel": (r"LDG\.E\.128", r"STG\.E\.128"),
        "mla_attention_key_gradients_kernel": (r"LDG\.E\.128", r"STG\.E\.128"),
        "mla_project_kernel": (r"LDG\.E\.128", r"STG\.E\.128"),
        "mla_project_backward_kernel": (r"LDG\.E\.128", r"STG\.E\.128"),
        "mla_decode_kernel": (
            r"HMMA\.16816\.F32",
            r"LDSM",
            r"LDGSTS\.E\.BYPASS\.128",
            r"STG\.E\.128 desc\[UR\d+\]\[R\d+\.64\], R\d",
        ),
        "ssd_scan_kernel": (r"HMMA\.16816\.F32", r"LDSM", r"LDGSTS\.E\.BYPASS\.128"),
    },
    "sm_90a": {
        "mla_decode_tma_kernel": (
            r"HMMA\.16816\.F32",
            r"LDSM",
            r"UTMALDG\.3D",
            r"USETMAXREG",
            r"STG\.E\.128 desc\[UR\d+\]\[R\d+\.64\], R\d",
        ),
        "linear_decode_sm90_kernel": (
            r"HGMMA\.64x16x16\.F32",
            r"UTMALDG\.4D",
            r"ACQBULK",
            r"PREEXIT",
        ),
        "ssd_scan_forward_kernel": (r"HGMMA\.64x128x16\.F32", r"UTMALDG\.5D", r"UTMASTG\.5D"),
        "ssd_scan_states_kernel": (r"HGMMA\.64x128x16\.F32", r"UTMALDG\.5D"),
    },
}
failures: list[str] = []


def expect(ok: bool, message: str) -> None:
    if not ok:
        failures.append(message)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda_tool(name: str) -> str:
    """cuobjdump or nvdisasm: from PATH, or from the pip package nvidia-cuda-<name>."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        found = found or next((str(p) for p in Path(root).glob(f"*/bin/{name}")), None)
    if not found:
        raise SystemExit(f"audit: {name} not found (pip install nvidia-cuda-{name})")
    os.environ["PATH"] += os.pathsep + str(Path(found).parent)
    return found


def audit_abi(lib: Path) -> None:
    """Only the stable ABI of torch; no Python; libtorch.so needed and no CUDA library."""
    audit = Path(sys.executable).parent / "torch-abi-audit"
    report = subprocess.run([audit, "--check", "torch", lib], capture_output=True, text=True)
    expect(report.returncode == 0, f"torch-abi-audit: {report.stdout}{report.stderr}")
    for so in lib.glob("*.so"):
        minimum = re.search(rf"{so.name}.*min-torch=([\d.]+)", report.stdout)
        expect(bool(minimum) and minimum.group(1) <= "2.10.0", f"{so.name}: minimum torch not 2.10")
        needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", so))
        expect("libtorch.so" in needed, f"{so.name}: libtorch.so is not NEEDED: {needed}")
        bad = [n for n in needed if re.match(r"lib(cuda|cudart|torch_|c10|python)", n)]
        expect(not bad, f"{so.name}: must not need {bad}")
        undefined = output("nm", "-D", "--undefined-only", so)
        python = re.findall(r"\bU (_?Py\w+)", undefined)
        expect(not python, f"{so.name}: uses Python symbols {python[:3]}")


def audit_isa(build: Path) -> None:
    """No code shared between the instruction-set builds: a weak symbol could carry AVX-512 away."""
    objects = list(build.glob("CMakeFiles/zebra_cpu_v[34].dir/**/*.o"))
    expect(bool(objects), f"no instruction-set objects under {build}")
    for obj in objects:
        isa = "v4" if "cpu_v4" in str(obj) else "v3"
        weak = re.findall(r"^\w+ [WVu] (.+)$", output("nm", "-C", obj), flags=re.M)
        shared = [s for s in weak if f"zebra::{isa}" not in s and not s.startswith("DW.ref")]
        expect(not shared, f"{obj.name} ({isa}): linkage shared with other builds: {shared[:4]}")


def audit_cuda(library: Path) -> None:
    """Every architecture is there; no kernel spills or uses a stack; the fast paths are wide."""
    cuobjdump = cuda_tool("cuobjdump")
    cuda_tool("nvdisasm")
    usage = output(cuobjdump, "-res-usage", library)
    archs = set(re.findall(r"arch = (sm_\w+)", usage))
    expect(archs >= ARCHS, f"CUDA architectures missing: {ARCHS - archs}")
    for name, stack in re.findall(r"Function (\S+):\s*\n.*?STACK:(\d+)", usage):
        expect(int(stack) == 0, f"{name}: {stack} bytes of stack (spills or local arrays)")
    for arch, kernels in FAST_PATH.items():
        sass = output(cuobjdump, "-sass", "-arch", arch, library)
        bodies = re.split(r"Function : ", sass)[1:]
        for fragment, patterns in kernels.items():
            mine = [b for b in bodies if fragment in b.split("\n", 1)[0]]
            expect(bool(mine), f"no {arch} kernel named *{fragment}*")
            for pattern in patterns:
                expect(
                    any(re.search(pattern, b) for b in mine),
                    f"{fragment}: no {pattern} in its SASS",
                )
        for body in bodies:
            local = re.search(r"\b(LDL|STL)\b", body)
            expect(local is None, f"{body.split(chr(10), 1)[0]}: local memory traffic in SASS")


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "zebra"
    audit_abi(package / "_lib")
    audit_isa(ROOT / "build" / "cmake")
    audit_cuda(package / "_lib" / "libzebra_cuda.so")
    if failures:
        raise SystemExit("audit failed:\n  " + "\n  ".join(failures))
    print("audit: stable ABI, separate instruction sets, all architectures, no spills, fast paths")


if __name__ == "__main__":
    main()
