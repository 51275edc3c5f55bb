"""What a queued video costs beside the bare library with a warm model, and what 1,000 of them leave behind.

    python bench/bench_web.py [--videos 10] [--jobs 1000]

The demo model takes about a second for a video, so what surrounds it weighs far more than with a real one.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

from flashi2v_infer import demo
from flashi2v_infer.commands.batch import read_one
from flashi2v_infer.commands.run import sample_jobs
from flashi2v_infer.defaults import read_defaults
from flashi2v_infer.execution import Execution
from flashi2v_infer.plan.measured import Meter
from flashi2v_infer.processes import join_processes
from flashi2v_infer.web.jobs import Job, Jobs
from flashi2v_infer.web.schema import Limits, Order, Served, request_of
from flashi2v_infer.web.worker import Setup
from flashi2v_infer.web.workers import Workers
from flashi2v_model.weights.libraries import quieten


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1000)
    arguments = parser.parse_args()
    quieten()
    gc.freeze()  # as commands do: nothing that is imported is garbage
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        jobs = Jobs(Path(directory))
        served = Served("demo", "demo", read_defaults("demo"), Limits(), {})
        setup = Setup(Path(directory), served, Execution(device="cpu", keep_text_encoder=True))
        image = jobs.add_image(demo.IMAGE.read_bytes())
        workers = Workers(setup, jobs, 1)
        workers.start()
        while not workers.num_ready():
            time.sleep(0.1)
        worker = workers._groups[0]._processes[0].pid

        def queue(**order: object) -> Job:
            job = jobs.add("", served.request(Order(prompt=demo.PROMPT, **order), image), 10**6)
            assert job is not None
            return job

        def ended(job: Job) -> Job:
            while not (found := jobs.get(job.id, "")) or not found.has_ended:
                time.sleep(0.01)
            assert found.state == "done", found.error
            return found

        model = setup.model()
        with join_processes("cpu") as processes:
            pipeline = model.load(model.settle(processes.device))

            def bare(seed: int) -> None:
                request = request_of(Job(**{**template.__dict__, "request": {**template.request, "seed": seed}}))
                batch = read_one(request, f"bare_{seed}.mp4", Path(f"bare_{seed}.png"))
                on_step_end = Meter(processes.device).on_step_end
                sample_jobs(pipeline, model, batch.jobs, processes, on_step_end, is_one=True)

            def queued(seed: int) -> None:
                job = queue(seed=seed)
                workers.wake()
                ended(job)

            template = queue(seed=0)
            workers.wake()
            ended(template)
            bare(0)
            ratios, cpu = [], {bare: 0.0, queued: 0.0}
            for seed in range(1, arguments.videos + 1):  # A B B A
                times = []
                for run in (bare, queued, queued, bare):
                    before, began = cpu_seconds(worker) + time.process_time(), time.perf_counter()
                    run(seed)
                    times.append(time.perf_counter() - began)
                    cpu[run] += cpu_seconds(worker) + time.process_time() - before
                ratios.append((times[1] + times[2]) / (times[0] + times[3]))
        spread = f"median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f}"
        print(f"queued / bare, seconds: {statistics.median(ratios):.3f} ({spread})")
        print(f"queued / bare, CPU seconds of all processes: {cpu[queued] / cpu[bare]:.3f}")

        before, began = resident(worker), time.perf_counter()
        many = [queue(seed=seed, num_frames=1, num_inference_steps=1, size="16x16") for seed in range(arguments.jobs)]
        print(f"{arguments.jobs} jobs queued in {time.perf_counter() - began:.1f} s")
        workers.wake()
        middle = 0.0
        for number, job in enumerate(many):
            ended(job)
            if number == arguments.jobs // 2:
                middle = resident(worker)
        print(f"and sampled in {time.perf_counter() - began:.1f} s; counts {jobs.counts()}")
        print(f"the worker's MiB: {before:.0f} before, {middle:.0f} half way, {resident(worker):.0f} at the end")
        workers.stop()
        os.chdir("/")


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has taken."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Return the MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
