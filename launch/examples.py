"""What `--help` shows below the flags of each command."""

HETEROSTEP = """\
examples:
  heterostep generate --prompt "a red disc moves right" --compute 0.5
  heterostep generate --prompt "a cat on a beach" --model ./Wan2.1-T2V-1.3B-Diffusers --output cat.mp4
  heterostep generate --prompt "it jumps" --image cat.jpg --model ./Wan2.2-TI2V-5B-Diffusers --output cat.mp4
  heterostep info --model demo
  heterostep plan --model wan2.1-14b --size 1280x720 --gpu h100 --gpus 8
  heterostep serve --no-ray --data-dir ./videos

`heterostep COMMAND --help` explains the flags of a command.
"""

GENERATE = """\
examples:
  half of the work, with a map of which tokens were computed:
    heterostep generate --prompt "a red disc moves right" --compute 0.5 --output v.mp4 --heatmap h.mp4
  compare speed and quality with the dense run:
    heterostep generate --prompt "a red disc moves right" --compute 0.33 --compare-dense --report r.json
  on two ranks of this machine:
    heterostep generate --prompt "a red disc moves right" --nproc 2 --ulysses 2 --output two.mp4
  on two ranks that are Ray actors:
    heterostep generate --prompt "a red disc moves right" --ray --nproc 2 --output two.mp4
  one video for each line of a file; the same command makes what is missing:
    heterostep generate --prompts lines.txt --job-dir many --output "{index}-{seed}.mp4"
  with LoRA weights at 0.8 of their strength:
    heterostep generate --prompt "a cat" --model ./Wan2.1-T2V-1.3B-Diffusers --lora style.safetensors:0.8
  a long run that the same command resumes after an interruption:
    heterostep generate --prompt "a red disc moves right" --job-dir disc --output disc.mp4

Flags that are left out take the model's defaults; `heterostep info --model M` shows them.
"""

DECODE = """\
examples:
  heterostep generate --prompt "a red disc moves right" --latents disc.safetensors
  heterostep decode disc.safetensors --output disc.mp4
  heterostep decode ./job-of-an-hour --output video.mp4 --scale 2

Only the VAE is loaded. Model, type and frame rate are those of the run that made the latents, unless flags name others.
"""

SERVE = """\
examples:
  on this machine, without Ray: API and web page at http://127.0.0.1:8000/
    heterostep serve --no-ray --data-dir ./videos
  two replicas with one GPU each on Ray Serve, for clients with an API key:
    heterostep serve --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --replicas 2 --gpus-per-replica 1 \\
        --host 0.0.0.0 --api-key-file keys.txt --data-dir /srv/videos

docs/serving.md describes the API, the settings, and what survives which failure.
"""

BENCH = """\
examples:
  the demo model, in minutes:
    heterostep bench quality --model demo --count 4 --output bench
  Wan 2.1 with the settings of MagCache's table, whose figures the report shows beside; how long it takes is said first:
    heterostep bench quality --model ./Wan2.1-T2V-1.3B-Diffusers --preset magcache --estimate
  other policies and methods, and prompts of your own:
    heterostep bench quality --model ./Wan2.1-T2V-1.3B-Diffusers --policies joint,tokens --baselines unipc,taylorseer \\
        --prompts prompts.txt --output wan

The folder holds report.md, report.json, report.png and index.html with the videos side by side. The same command
continues after an interruption. docs/benchmarks.md describes it.
"""

LOAD = """\
examples:
  ten requests, one after the other, to a service on this machine:
    heterostep bench serving --num-prompts 10 --width 832 --height 480 --num-frames 81
  an open loop: requests that arrive by chance, two a minute, and how many end within three times the warm-up's time:
    heterostep bench serving --base-url http://gpu1:8000 --request-rate 0.033 --num-prompts 50 --slo \\
        --output-file result.json

Flags and keys of the result are those of SGLang's bench_serving where it has them. docs/benchmarks.md describes them.
"""

SPEED = """\
examples:
  heterostep bench offline --model ./Wan2.1-T2V-1.3B-Diffusers --computes 1,0.5 --output-file offline.json
  heterostep bench offline --preset mlperf-wan22 --model ./Wan2.2-T2V-A14B-Diffusers --replicas 4 --nproc 2 \\
      --prompts vbench_prompts.txt --noise fixed_latent.pt --save videos
  heterostep bench scaling --model ./Wan2.1-T2V-1.3B-Diffusers --gpus 8
  heterostep bench step --shape wan-1.3b --output-file step.json --compare before.json
  heterostep bench recovery --nproc 2 --policy tokens --compute 0.5
  heterostep bench calibrate --shape wan-1.3b --nproc 2 --output-file mine.json

docs/benchmarks.md describes the verbs and the form of their results.
"""

PLAN = """\
examples:
  half of the work for Wan 2.1 14B at 720p on eight GPUs:
    heterostep plan --model wan2.1-14b --size 1280x720 --frames 81 --steps 50 --compute 0.5 --gpu h100 --gpus 8
  what 1 to 1,024 GPUs deliver:
    heterostep plan --model wan2.2-a14b --compute 1 --gpu h200 --sweep --plot sweep.png --json sweep.json

No weights, GPU or network are needed. docs/planning.md says what is measured and what is estimated.
"""
