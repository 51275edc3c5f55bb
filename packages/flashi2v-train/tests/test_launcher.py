"""The command line's options as the reference's script passes them, and processes: started, stopped, failing."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cyclopts import App

from flashi2v_data.errors import InputError
from flashi2v_npu_ops import registry
from flashi2v_train import launcher, processes
from flashi2v_train.options import ForeignOptions, LaunchOptions, TrainOptions

SCRIPT = Path(__file__).parent / "run_processes.py"

REFERENCE_OPTIONS = shlex.split("""
--mm-tool tool.json --nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6001
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --virtual-pipeline-model-parallel-size 1
--context-parallel-size 1 --context-parallel-algo ulysses_cp_algo --micro-batch-size 1 --global-batch-size 1
--lr 2e-5 --min-lr 2e-5 --lr-decay-style constant --lr-warmup-init 0 --lr-warmup-iters 0
--adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-15 --weight-decay 1e-2 --clip-grad 1.0 --clip_grad_ema_decay 0.99
--train-iters 1000000 --seed 1024 --bf16 --accumulate-allreduce-grads-in-fp32 --fp32-residual-connection
--attention-softmax-in-fp32 --recompute-granularity full --recompute-method block --recompute-num-layers 0
--recompute-skip-core-attention --recompute-num-layers-skip-core-attention 22
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--optimizer-selection fused_ema_adamw --use-ema --load SAVE --save SAVE --save-interval 10
--no-load-optim --no-load-rng --no-save-optim --no-save-rng
--log-interval 1 --eval-interval 5 --eval-iters 10 --tensorboard-log-interval 1
--wandb-project project --wandb-exp-name name --wandb-save-dir wandb
--no-gradient-accumulation-fusion --data-parallel-random-init --distributed-backend nccl
""")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """As without torchrun and Slurm; what a test sets is taken back."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.fixture
def trained(monkeypatch):
    """The configurations of runs that were started, which do not train."""
    configs = []
    monkeypatch.setattr(launcher, "_train", configs.append)
    return configs


def parse(arguments: list[str]) -> TrainOptions:
    app, found = App(), []

    @app.default
    def collect(*, options: TrainOptions) -> None:
        found.append(options)

    app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    return found[0]


def main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flashi2v-train", *arguments])
    with pytest.raises(SystemExit) as stop:
        launcher.main()
    return stop.value.code


def test_a_backend_of_operators_that_does_not_exist_is_refused_before_a_model_is_built(workspace, monkeypatch, capsys):
    monkeypatch.setenv("FLASHI2V_OPS_BACKEND", "attention=nonsense")
    registry._environment.cache_clear()  # what an earlier test read
    files = [part for name, path in workspace.files().items() for part in (f"--{name}", str(path))]
    assert main(monkeypatch, *files, "--device", "cpu", "--save", str(workspace.directory / "save")) == 2
    assert "flashi2v-train: attention has no backend 'nonsense': choose one of" in capsys.readouterr().err


def test_the_references_whole_script_starts_and_each_foreign_option_is_answered_once(
    workspace, trained, monkeypatch, capsys
):
    pytest.importorskip("wandb")  # which the script asks for
    options = [str(workspace.directory / "save") if part == "SAVE" else part for part in REFERENCE_OPTIONS]
    files = [part for name, path in workspace.files().items() for part in (f"--{name}", str(path))]
    assert main(monkeypatch, *files, "--device", "cpu", *options) == 0
    lines = capsys.readouterr().err.splitlines()
    for name, field in ForeignOptions.model_fields.items():
        answers = [line for line in lines if f"--{name.replace('_', '-')}:" in line]
        assert len(answers) == 1, name
        assert field.description in answers[0]
    (config,) = trained
    assert config.options.clip_grad_ema_decay == 0.99
    assert not config.options.save_optim


def test_options_that_were_not_given_are_not_answered(workspace):
    options = parse(workspace.arguments())
    assert options.notes() == []


REFUSED = {
    "a still start of narrow tokens": (["--start", "still"], "predictor.hidden_size must be at least 64"),
    "degree without hybrid": (["--ulysses-degree-in-cp", "2"], "without --context-parallel-algo hybrid_cp_algo"),
    "an algorithm that is not there": (["--context-parallel-algo", "adaptive_cp_algo"], "--context-parallel-algo"),
    "no overlap": (["--no-overlap-grad-reduce"], "always so"),
    "softmax in bf16": (["--no-attention-softmax-in-fp32"], "always so"),
    "ema without ema": (["--optimizer-selection", "fused_ema_adamw", "--no-use-ema"], "contradicts --no-use-ema"),
    "average that is not kept": (
        ["--eval-interval", "5", "--eval-ema", "--no-use-ema"],
        "--eval-ema contradicts --no-use-ema",
    ),
    "layout of one process": (["--pipeline-model-parallel-size", "2"], "must divide the 1 processes"),
    "layout of three": (["--nproc-per-node", "3", "--context-parallel-size", "2"], "must divide the 3 processes"),
    "layout of an elastic run": (
        ["--nnodes", "1:3", "--nproc-per-node", "1", "--rdzv-endpoint", "host:1", "--global-batch-size", "2"],
        "multiple of",
    ),
    "elastic without rendezvous": (["--nnodes", "1:2"], "--rdzv-endpoint"),
    "no machines": (["--nnodes", "0"], "counted from 1"),
    "machines without a port": (["--nnodes", "2"], "--master-port"),
    "a machine too many": (["--nnodes", "2", "--node-rank", "2", "--master-port", "6001"], "--node-rank 2"),
    "endpoint with static": (["--nnodes", "2", "--rdzv-backend", "static", "--rdzv-endpoint", "a:1"], "--master-addr"),
    "rendezvous without endpoint": (["--nnodes", "2", "--rdzv-backend", "c10d"], "--rdzv-endpoint"),
    "rendezvous without name": (["--nnodes", "2", "--rdzv-endpoint", "host:1"], "--rdzv-id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_starts(workspace, trained, monkeypatch, capsys, case):
    arguments, words = REFUSED[case]
    assert main(monkeypatch, *workspace.arguments(), *arguments) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not trained


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import fails
from flashi2v_train.launcher import main
for arguments in (["--help"], sys.argv[1:], [*sys.argv[1:], "--sav", "run"]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        print("code", stop.code)
"""


def test_help_and_mistakes_are_told_before_torch_is_imported(workspace):
    arguments = workspace.arguments({"model.predictor.hiden_size": 3})
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert re.findall("code .*", done.stdout) == ["code 0", "code 2", "code 2"], done.stderr
    wrong_key, wrong_option = done.stderr.splitlines()
    assert "'hidden_size'" in wrong_key
    assert re.search('Unknown option: "?--sav', wrong_option)  # as cyclopts says it, older or newer


def test_launch_options_reach_torchs_launcher(tmp_path):
    def config(**options):
        return processes.launch_config(LaunchOptions(nproc_per_node=8, **options), tmp_path)

    alone = config(max_restarts=3)
    assert (alone.rdzv_backend, alone.rdzv_endpoint, alone.max_restarts) == ("c10d", "localhost:0", 3)
    assert alone.run_id != config().run_id
    static = [config(nnodes="2", node_rank=i, master_addr="first", master_port=6001) for i in range(2)]
    assert [c.rdzv_configs["rank"] for c in static] == [0, 1]
    assert {(c.rdzv_backend, c.rdzv_endpoint, c.run_id, c.max_nodes) for c in static} == {
        ("static", "first:6001", static[0].run_id, 2)
    }
    elastic = config(nnodes="1:4", rdzv_endpoint="first:29400", rdzv_id="run")
    assert (elastic.rdzv_backend, elastic.min_nodes, elastic.max_nodes, elastic.run_id) == ("c10d", 1, 4, "run")


def test_only_a_run_of_one_process_that_nobody_restarts_is_in_this_one():
    assert not processes.needs_launch(LaunchOptions())
    for options in ({"nproc_per_node": 2}, {"nnodes": "2"}, {"nnodes": "1:2"}, {"max_restarts": 1}):
        assert processes.needs_launch(LaunchOptions(**options))


def test_world_sizes_are_those_of_all_machines():
    assert processes.world_sizes(LaunchOptions(nproc_per_node=4, nnodes="3")) == [12]
    assert processes.world_sizes(LaunchOptions(nproc_per_node=4, nnodes="1:3")) == [4, 8, 12]


TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    "MASTER_ADDR": "first", "MASTER_PORT": "6001",
}  # fmt: skip


def test_inside_torchrun_only_options_that_contradict_it_are_refused():
    os.environ.update(TORCHRUN)
    fitting = LaunchOptions(nproc_per_node=2, nnodes="2", node_rank=0, master_addr="first", master_port=6001)
    processes.check_started(fitting)
    assert processes.world_sizes(fitting) == [4]
    assert not processes.needs_launch(fitting)
    for name, value in {
        "nproc_per_node": 4, "nnodes": "1", "node_rank": 1, "master_addr": "other", "max_restarts": 1, "rdzv_id": "a",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}"):
            processes.check_started(LaunchOptions(**{name: value}))


def test_a_task_of_slurm_learns_what_torchrun_would_have_told_it():
    os.environ |= {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_JOB_NODELIST": "node[07-08,12],gpu1", "SLURM_JOB_ID": "1234567",
    }  # fmt: skip
    line = processes.adopt_slurm(LaunchOptions())
    assert line is not None
    found = {**os.environ}
    assert {name: found[name] for name in TORCHRUN} == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "2",
        "MASTER_ADDR": "node07", "MASTER_PORT": "24567",
    }  # fmt: skip
    assert "WORLD_SIZE=7" in line


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, {"nnodes": "2"}),  # a launcher on every machine
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "RANK": "0"}, {}),  # torchrun within srun
    ],
)
def test_outside_of_srun_slurms_variables_mean_nothing(environment, options):
    os.environ |= environment
    assert processes.adopt_slurm(LaunchOptions(**options)) is None


@pytest.mark.parametrize(
    ("text", "host"), [("a", "a"), ("a-1,b", "a-1"), ("n[003-9,12]", "n003"), ("n[7]", "n7"), ("x[1],y", "x1")]
)
def test_the_first_machine_of_a_node_list(text, host, monkeypatch):
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    assert processes.first_host(text) == host


def test_a_node_list_in_another_form_is_not_guessed_at(monkeypatch):
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="--master-addr"):
        processes.first_host("rack[1-2]n[1-4]")


def test_ascends_variables_are_set_unless_exported_and_told():
    os.environ["TASK_QUEUE_ENABLE"] = "1"
    assert processes.set_ascend_environment("cpu") is None
    assert "HCCL_CONNECT_TIMEOUT" not in os.environ
    line = processes.set_ascend_environment("npu")
    assert line is not None
    assert "TASK_QUEUE_ENABLE=1 (yours)" in line
    assert "HCCL_CONNECT_TIMEOUT=1200 " in line
    assert os.environ["TASK_QUEUE_ENABLE"] == "1"
    assert os.environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"


def test_a_dry_run_starts_nothing_and_describes_the_layout_asked_for(workspace, trained, monkeypatch, capsys):
    monkeypatch.setattr("flashi2v_train.dry_run.describe_run", lambda config, dims: f"{dims.data} x {dims.pipeline}")
    monkeypatch.setattr(launcher, "suggest_split", lambda config, layout: "split")
    layout = ["--nproc-per-node", "8", "--nnodes", "2", "--pipeline-model-parallel-size", "2"]
    layout += ["--global-batch-size", "16"]
    assert main(monkeypatch, *workspace.arguments(), *layout, "--dry-run") == 0
    assert capsys.readouterr().out == "8 x 2\n"
    assert main(monkeypatch, *workspace.arguments(), *layout, "--suggest-split") == 0
    assert capsys.readouterr().out == "split\n"
    assert not trained


# Real processes


def begin(directory: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, words[0], directory, *words[1:]],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(directory: Path, *names: str) -> None:
    while not all((directory / name).exists() for name in names):
        time.sleep(0.1)


def test_a_stopped_launcher_lets_its_processes_save_and_exits_0(tmp_path):
    process = begin(tmp_path, "stop")
    wait_for(tmp_path, "running_0", "running_1")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {path.name for path in tmp_path.glob("saved_*")} == {"saved_0", "saved_1"}


def test_two_machines_meet_at_the_first_and_stop_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    words = ["nproc_per_node=1", "nnodes=2", f"master_port={port}"]
    launchers = [begin(tmp_path, "stop", *words, f"node_rank={rank}") for rank in range(2)]
    wait_for(tmp_path, "running_0", "running_1")
    launchers[1].send_signal(signal.SIGTERM)  # the processes agree
    for process in launchers:
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    wait_for(tmp_path, "saved_0", "saved_1")


def test_two_tasks_of_slurm_find_each_other(tmp_path):
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    tasks = [begin(tmp_path, "slurm", **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    wait_for(tmp_path, "running_0", "running_1")
    tasks[0].send_signal(signal.SIGUSR1)
    for task in tasks:
        _, stderr = task.communicate()
        assert task.returncode == 0, stderr
    wait_for(tmp_path, "saved_0", "saved_1")


def test_a_failed_process_is_restarted_with_all_others(tmp_path):
    process = begin(tmp_path, "restart")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    wait_for(tmp_path, *(f"attempt_{attempt}_rank_{rank}" for attempt in range(2) for rank in range(2)))


@pytest.mark.parametrize(
    ("work", "message"),
    {
        "input error": "InputError: the data is wrong (process 1 on {host})",
        "storage error": "RunError: the disk is full (process 1 on {host})",
        "other error": "RunError: process 1 on {host} failed before the others: KeyError: 'what'",
        "killed": "RunError: process 1 on {host} was ended by SIGKILL",
    }.items(),
)
def test_the_error_that_ended_the_run_is_told_with_its_process(tmp_path, work, message):
    _, stderr = begin(tmp_path, work).communicate()
    assert stderr.splitlines()[-1].startswith(message.format(host=socket.gethostname()))
    # What the user did wrong is no traceback.
    assert ("Traceback" in stderr) == (work == "other error"), stderr
