"""`heterostep generate --ray-address` with one rank on each of two machines."""

import functools
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import forked
import machines
from waiting import until

pytest.importorskip("ray", reason="the extra 'ray' is not installed")
pytestmark = pytest.mark.slow

GENERATE = (sys.executable, "-m", "heterostep", "generate", "--prompt", "a red disc moves right", "--frames", "5")
GENERATE += ("--steps", "6", "--policy", "tokens", "--latents", "l.safetensors")


def test_ranks_on_two_machines_meet_and_make_the_video_of_one(bed, tmp_path):
    main, other = bed[:2]
    flags = ("--ray-address", f"{main.address}:{machines.RAY_PORT}", "--nproc", "2", "--ulysses", "2")
    try:
        for machine in (main, other):
            until(functools.partial(machines.has_started, machines.start_ray(machine, main)), 60)
        with main.entered(), open(main.folder / "log", "w") as log:
            environment = os.environ | machines.RAY_ENVIRONMENT
            process = subprocess.Popen([*GENERATE, *flags], cwd=main.folder, env=environment, stdout=log, stderr=log)
        assert process.wait(120) == 0, (main.folder / "log").read_text()
    finally:
        for machine in (main, other):
            machine.kill()
            subprocess.run(["rm", "-rf", f"/tmp/{machine.name}"], check=True)
    alone = forked.run([*GENERATE], cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    found, wanted = (load_file(folder / "l.safetensors")["latents"] for folder in (main.folder, tmp_path))
    assert (found - wanted).abs().max() < 1e-4
