"""`heterostep generate --ray-address` with one rank on each of two machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import forked
from waiting import until

pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.slow

RAY = Path(sys.executable).with_name("ray")
GENERATE = (sys.executable, "-m", "heterostep", "generate", "--prompt", "a red disc moves right", "--frames", "5")
GENERATE += ("--steps", "6", "--policy", "tokens", "--latents", "l.safetensors")


def on(machine, *command, log):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with machine.entered(), open(machine.folder / log, "a") as out:
        return subprocess.Popen(
            [*map(str, command)], cwd=machine.folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )


def test_ranks_on_two_machines_meet_and_make_the_video_of_one(bed, tmp_path):
    main, other = bed[:2]
    head = f"{main.address}:6379"
    try:
        for machine, joins in ((main, ("--head", "--port", "6379", "--include-dashboard", "false")), (other, ())):
            place = ("--node-ip-address", machine.address, "--temp-dir", f"/tmp/{machine.name}")
            size = ("--num-cpus", "1", "--object-store-memory", "100000000", "--block")
            on(machine, RAY, "start", *(joins or ("--address", head)), *place, *size, log="ray")
            log = machine.folder / "ray"
            until(lambda log=log: "Ray runtime started" in log.read_text(), 60)
        process = on(main, *GENERATE, "--ray-address", head, "--nproc", "2", "--ulysses", "2", log="log")
        assert process.wait(120) == 0, (main.folder / "log").read_text()
    finally:
        for machine in (main, other):
            machine.kill()
            subprocess.run(["rm", "-rf", f"/tmp/{machine.name}"], check=True)
    alone = forked.run([*GENERATE], cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    found, wanted = (load_file(folder / "l.safetensors")["latents"] for folder in (main.folder, tmp_path))
    assert (found - wanted).abs().max() < 1e-4
