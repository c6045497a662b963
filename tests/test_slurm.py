"""slurm/: what train.sbatch starts and when it requeues; by hand, a real Slurm here and two network namespaces.

The default tests put stand-ins for srun, sbatch and scontrol on the PATH: a dry run that checks the launch lines. The
stand-in for srun runs its tasks here, so that the slow test trains on two "nodes". The campaign starts munged,
slurmctld and two slurmd (Debian: slurm-wlm munge) as root; without them it says so and skips:
  pytest -m campaign -s tests/test_slurm.py
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT, free_port, load
from test_faults import READY, curve, same_curve, sizes, weights, whole

SBATCH = ROOT / "slurm" / "train.sbatch"
SCRIPTS = ["train.sbatch", "cluster.env", "lapa.sh"]
TORCH = [name for name in FOLDERS if name != "vae_distill"]

# a stand-in for srun: notes its words, then starts the tasks as Slurm would, here
SRUN = """#!{python}
import json, os, subprocess, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(["srun", *sys.argv[1:]]) + "\\n")
words = sys.argv[1:]
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--") and words.index(word) < 9)
command = words[next(i for i, word in enumerate(words) if not word.startswith("--")):]
if os.environ.get("SRUN"):
    os.execvp("bash", ["bash", "-c", os.environ["SRUN"]])
tasks, nodes, parts = int(flags["ntasks"]), int(flags["nodes"]), []
for rank in range(tasks):
    node, local = divmod(rank, tasks // nodes)
    more = dict(SLURM_NODEID=node, SLURM_PROCID=rank, SLURM_LOCALID=local, SLURM_NTASKS=tasks)
    parts.append(subprocess.Popen(command, env=os.environ | {{name: str(value) for name, value in more.items()}}))
sys.exit(max([part.wait() for part in parts]))
"""
NOTE = """#!{python}
import json, os, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("first\\nsecond")
elif "sbatch" in sys.argv[0]:
    print(sum(1 for line in open("calls.jsonl")) + 100)
"""


@pytest.fixture
def place(tmp_path):
    """A scratch checkout with the stand-ins in bin/, and a function that starts a job's script in it."""
    here = tmp_path / "a checkout"
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "wandb"))
    (tmp_path / "bin").mkdir()
    for name, text in dict(srun=SRUN, sbatch=NOTE, scontrol=NOTE).items():
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    return Place(here, tmp_path / "bin")


class Place:
    def __init__(self, here, bin):
        self.here = here
        path = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = {**keep, "PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "WANDB_MODE": "offline"}

    def start(self, *words, script="slurm/train.sbatch", **env):
        env = self.env | {name: str(value) for name, value in env.items()}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        return subprocess.Popen(
            ["bash", script, *map(str, words)], cwd=self.here, env=env, start_new_session=True, **pipes
        )

    def run(self, *words, timeout=300, **more):
        with self.start(*words, **more) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def job(self, *words, nodes=1, **env):
        """Run the script as Slurm does inside of job 77."""
        return self.run(*words, SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_NODELIST="n[1-2]", **env)

    def calls(self, name):
        lines = (self.here / "calls.jsonl").read_text().splitlines() if (self.here / "calls.jsonl").exists() else []
        return [words for program, *words in map(json.loads, lines) if program == name]

    def log(self, out):
        (file,) = (self.here / out).glob("slurm-*.log")
        return file.read_text()


# --- the files


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_syntax(name):
    """A script that bash, or shellcheck where it is installed, does not take."""
    file = ROOT / "slurm" / name
    done = subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    if shutil.which("shellcheck"):
        words = ["shellcheck", "-x", "--shell=bash", "--severity=warning", file]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stdout


def test_cluster_env_examples(tmp_path):
    """An example that is no shell any more once its # is gone, or sets what nothing reads."""
    text = (ROOT / "slurm" / "cluster.env").read_text()
    examples = [line[2:] for line in text.splitlines() if re.match(r"# (export |\w+=|\[ |source )", line)]
    assert len(examples) >= 9
    (tmp_path / "env").write_text("\n".join(line for line in examples if not line.startswith("source")))
    done = subprocess.run(
        ["bash", "-uec", f". {tmp_path}/env"], capture_output=True, text=True, check=False, env={"USER": "me"}
    )
    assert done.returncode == 0, done.stderr
    known = SBATCH.read_text()
    for name in re.findall(r"\b([A-Z][A-Z_]+)=", "\n".join(examples)):
        assert name.startswith(("SBATCH_", "NCCL_", "GLOO_", "HF_", "WANDB_")) or re.search(rf"\b{name}\b", known), name
    assert not [line for line in text.splitlines() if line and not line.startswith("#")], (
        "a fresh checkout sets something"
    )


def test_containers_follow_requirements():
    """The ROCm image installs a torch that requirements.txt then replaces by a CUDA one."""
    pin = re.search(r"^torch(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f'"torch{pin}"' in (ROOT / "slurm" / "Dockerfile.rocm").read_text()
    for name in ("Dockerfile", "Dockerfile.rocm"):
        text = (ROOT / "slurm" / name).read_text()
        assert "COPY requirements.txt" in text and f"slurm/{name} " in text and "enroot import" in text


# --- launch lines


@pytest.mark.parametrize("folder", TORCH)
def test_torch_folders_start_one_torchrun_per_node(place, folder):
    """Two nodes of four GPUs: one torchrun on each, eight processes that meet at the first node."""
    (place.here / folder / "train.py").write_text("common.flags(")
    done = place.job(folder, "--data", "x y=/a b", "--out", "o p", nodes=2, SLURM_GPUS_ON_NODE=4, SRUN="true")
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = place.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= {*words}
    start = words.index("bash")
    assert words[start + 2] == 'exec python -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"'
    launch = "torchrun --nnodes 2 --nproc_per_node 4 --master_addr first --master_port 10154".split()
    assert words[start + 3 :] == [*launch, f"{folder}/train.py", "--data", "x y=/a b", "--out", "o p"]


def test_jax_joins_its_own_processes(place):
    """vae_distill: one task per GPU, told who it is; no torchrun, for this folder needs no torch."""
    (place.here / "vae_distill").mkdir(exist_ok=True)
    script = place.here / "vae_distill" / "train.py"
    script.write_text(
        "# common.flags(\nimport json, os, sys\n"
        "names = 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT'.split()\n"
        "open('rank' + os.environ['RANK'], 'w').write(json.dumps([os.environ[n] for n in names] + sys.argv[1:]))\n"
    )
    done = place.job("vae_distill", "--out", "o p", nodes=2, SLURM_GPUS_ON_NODE=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (words,) = place.calls("srun")
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2"} <= {*words} and "torch" not in " ".join(words)
    for rank in range(4):
        seen = json.loads((place.here / f"rank{rank}").read_text())
        assert seen == [str(rank), "4", str(rank % 2), "first", "10154", "--out", "o p"]


@pytest.mark.parametrize("env, ranks", [({}, 1), ({"SLURM_NTASKS_PER_NODE": 3}, 3), ({"RANKS_PER_NODE": 2}, 2)])
def test_processes_per_node(place, env, ranks):
    """GPUs of the node; without any, --ntasks-per-node; and cluster.env wins. One process needs no torchrun."""
    done = place.job("fsq_vqvae", "--out", "o", SRUN="true", **env)
    assert done.returncode == 0, done.stderr
    line = " ".join(place.calls("srun")[0])
    assert (
        (f"--nproc_per_node {ranks}" in line)
        if ranks > 1
        else line.endswith("--ntasks=1 python fsq_vqvae/train.py --out o")
    )
    assert f"1 x {ranks} process(es)" in place.log("o")


def test_without_out_each_job_has_a_folder_of_its_own(place):
    """A requeued job starts a second run beside its first, or two jobs share one."""
    for _ in range(2):
        assert place.job("fsq_vqvae", SRUN="true").returncode == 0
    first, second = place.calls("srun")
    assert first == second and first[-2:] == ["--out", "runs/fsq_vqvae/job_77"]
    place.job("fsq_vqvae", "--seed", "%a", SLURM_ARRAY_JOB_ID=70, SLURM_ARRAY_TASK_ID=3, SRUN="true")
    assert place.calls("srun")[-1][-4:] == ["--seed", "3", "--out", "runs/fsq_vqvae/job_70_3"]
    assert (place.here / "runs/fsq_vqvae/job_70_3/slurm-70_3.log").exists()


def test_arrays(place):
    """%a is the number in an array, in every flag; without it all jobs would be one run, or write into one folder."""
    array = dict(SLURM_ARRAY_JOB_ID=70, SLURM_ARRAY_TASK_ID=12)
    assert place.job("fsq_vqvae", "@sweep/%a.args", "--out", "s/%a_%a", SRUN="true", **array).returncode == 0
    assert place.calls("srun")[-1][-3:] == ["@sweep/12.args", "--out", "s/12_12"]
    for words in (["--out", "s"], ["--seed", "%a", "--out", "s"], []):
        done = place.job("fsq_vqvae", *words, **array)
        assert done.returncode == 2 and "%a" in done.stderr and done.stderr.count("\n") == 1


def test_verbs(place):
    """laq/label.py has no --resume, and its --out is no run's folder: nothing is put there."""
    (place.here / "laq").mkdir(exist_ok=True)
    (place.here / "laq" / "label.py").write_text("")
    done = place.job("laq/label.py", "--out", "o", SLURM_RESTART_COUNT=1, SRUN="true")
    assert done.returncode == 0 and "1 x 1 process(es)" in done.stdout and not (place.here / "o").exists()
    assert place.calls("srun")[-1][-3:] == ["laq/label.py", "--out", "o"]


def test_container(place):
    """Pyxis' flags: the image, the checkout at its own path, what cluster.env mounts, the cache."""
    env = dict(CONTAINER="/i/robot.sqsh", MOUNTS="/data:/data", CACHE="/local/c")
    for folder, nodes in (("fsq_vqvae", 1), ("fsq_vqvae", 2), ("vae_distill", 2)):
        (place.here / folder).mkdir(exist_ok=True)
        (place.here / folder / "train.py").write_text("common.flags(")
        assert place.job(folder, nodes=nodes, SRUN="true", **env).returncode == 0
        words, here = place.calls("srun")[-1], place.here
        assert words[: words.index("bash" if nodes > 1 else "python")][-3:] == [
            "--container-image=/i/robot.sqsh",
            f"--container-mounts={here}:{here},/data:/data,/local/c:/local/c",
            f"--container-workdir={here}",
        ]


def test_cache(place):
    """--data and --labels are copied to each node and read there, under the same names; nothing else is."""
    for name in ("d/web", "d/b c", "d/labels"):
        (place.here / name).mkdir(parents=True)
    words = ["--data", "w=d/web", "d/b c", "module:x.py", "--labels", "d/labels", "--init", "d/web", "--out", "o"]
    cache = place.here.parent / "cache"
    assert place.job("fsq_vqvae", *words, nodes=2, CACHE=cache, SRUN="true").returncode == 0
    copy, train = place.calls("srun")
    here = place.here.resolve()
    assert copy[-4:] == [str(cache), f"{here}/d/web", f"{here}/d/b c", f"{here}/d/labels"]
    assert {"--ntasks=2", "--ntasks-per-node=1"} <= {*copy}
    there = f"{cache}{here}"
    expected = ["--data", f"w={there}/d/web", f"{there}/d/b c", "module:x.py", "--labels", f"{there}/d/labels"]
    assert train[train.index("--data") :] == [*expected, "--init", "d/web", "--out", "o"]
    done = place.job("fsq_vqvae", *words, CACHE=cache, SRUN="exit 23")
    assert done.returncode == 2 and "no copy of the data" in place.log("o") and len(place.calls("srun")) == 3


@pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")
def test_cache_holds_the_data(place):
    """The copy lies where the flags say; a second job copies what has changed."""
    (place.here / "d ü").mkdir()
    (place.here / "d ü" / "a.tar").write_text("one")
    cache = place.here.parent / "cache"
    for text in ("one", "longer"):
        (place.here / "d ü" / "a.tar").write_text(text)
        (place.here / "show.py").write_text("import sys\nprint(open(sys.argv[2] + '/a.tar').read())\n")
        done = place.job("show.py", "--data", "d ü", CACHE=cache)
        assert done.returncode == 0 and f"\n{text}\n" in done.stdout, done.stderr
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["a.tar"]


def test_outside_of_a_job_it_prints(place):
    """The reader wants to see what a job would start before queueing for it."""
    (place.here / "d").mkdir()
    done = place.run("fsq_vqvae", "--data", "d", CACHE="/local", RANKS_PER_NODE=2)
    assert done.returncode == 0 and done.stdout.startswith("not in a Slurm job; one would start:\n")
    assert done.stdout.count("'srun' ") == 2 and "rsync" in done.stdout and not (place.here / "calls.jsonl").exists()


@pytest.mark.parametrize("words, text", [([], "expected a folder"), (["lap"], "lap: no such script")])
def test_wrong_words(place, words, text):
    done = place.job(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and text in done.stderr


# --- requeue


def asked(place, code, number=signal.SIGUSR1, script="fsq_vqvae"):
    """Exit code and log of a job that gets a signal while its run waits for OUT/stop and then ends with `code`."""
    wait = f"touch started; until [ -e o/stop ] || [ -e o/now ]; do sleep 0.05; done; exit {code}"
    out = ["--out", "o"] if script == "fsq_vqvae" else []
    job = dict(SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=1, SLURM_JOB_NODELIST="n1", SRUN=wait)
    with place.start(script, *out, **job) as process:
        while not (place.here / "started").exists():
            time.sleep(0.02)
        os.kill(process.pid, number)  # B: the batch shell alone
        if number == signal.SIGTERM:
            time.sleep(0.3)
            (place.here / "o").mkdir(exist_ok=True)
            (place.here / "o" / "now").touch()
        process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("code, requeued", [(75, True), (1, True), (0, False)])
def test_usr1_stops_the_run_and_requeues(place, code, requeued):
    """75 (or torchrun's 1 for it) after Slurm's signal is requeued; a run that was at its end anyway is not."""
    assert asked(place, code) == code
    assert place.calls("scontrol") == [["requeue", "77"]] * requeued
    assert "is asked to end" in place.log("o")


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False)])
def test_a_run_that_ends_while_the_signal_is_handled(place, code, requeued):
    """The job takes the code of its interrupted wait, 138, for the run's, and requeues what is done."""
    slow = Path(place.env["PATH"].split(":")[0]) / "touch"
    slow.write_text(f'#!/bin/bash\n{shutil.which("touch")} "$@"\nsleep 1\n')
    slow.chmod(0o755)
    assert asked(place, code) == code
    assert place.calls("scontrol") == [["requeue", "77"]] * requeued


def test_asked_to_end_while_the_data_is_copied(place):
    """The run would start, take OUT/stop for an old one, and be killed at the time limit."""
    (place.here / "d").mkdir()
    job = dict(SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=1, SLURM_JOB_NODELIST="n1", CACHE="/local")
    with place.start("fsq_vqvae", "--data", "d", "--out", "o", SRUN="touch started; sleep 1", **job) as process:
        while not (place.here / "started").exists():
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode == 75 and place.calls("scontrol") == [["requeue", "77"]]
    assert len(place.calls("srun")) == 1


def test_a_verb_is_ended_and_requeued(place):
    """label.py reads no OUT/stop; it goes on by itself where it was."""
    (place.here / "verb.py").write_text("")
    assert asked(place, 0, script="verb.py") != 0
    assert place.calls("scontrol") == [["requeue", "77"]]


def test_what_is_not_requeued(place):
    """A crash, a user's own OUT/stop, a preemption (Slurm requeues that itself): a requeue would loop or fail."""
    for code in (1, 2, 75):
        assert place.job("fsq_vqvae", "--out", "o", SRUN=f"exit {code}").returncode == code
    assert asked(place, 75, signal.SIGTERM) == 75  # it waited for the run to save
    assert not place.calls("scontrol")


def test_a_restart_resumes(place):
    for count, more in ((0, []), (1, ["--resume"]), (7, ["--resume"])):
        place.job("fsq_vqvae", "--out", "o", SLURM_RESTART_COUNT=count, SRUN="true")
        assert place.calls("srun")[-1][-2:] == [*["--out", "o"], *more][-2:]
    assert place.log("o").count(", start ") == 3  # one file for all starts


# --- the LAPA pipeline


def test_lapa_is_a_chain(place):
    """Each stage waits for the one before and reads what it writes; nobody waits for ever for a failed one."""
    env = dict(VIDEOS="s/web", ROBOT="s/robot", OUT="o p", BACKBONE="b c")
    done = place.run("--nodes", 2, script="slurm/lapa.sh", **env)
    assert done.returncode == 0, done.stderr
    calls = place.calls("sbatch")
    names = [words[words.index("--job-name") + 1] for words in calls]
    assert names == ["laq", "label", "vla", "finetune"]
    waits = [re.findall(r"--dependency=(\S+)", " ".join(words)) for words in calls]
    assert waits == [[], ["afterok:101"], ["afterok:102"], ["afterok:103"]]
    assert all("--kill-on-invalid-dep=yes" in words and "--parsable" in words for words in calls)
    assert ["--nodes" in words for words in calls] == [True, False, True, True]
    flags = [words[words.index("slurm/train.sbatch") + 1 :] for words in calls]
    assert [words[0] for words in flags] == ["laq", "laq/label.py", "vla", "vla/finetune.py"]
    assert (
        "o p/laq/checkpoints/best" in flags[1] and "o p/labels" in flags[2] and "o p/vla/checkpoints/best" in flags[3]
    )
    for name in env:
        done = place.run(script="slurm/lapa.sh", **{key: value for key, value in env.items() if key != name})
        assert done.returncode == 2 and f"{name} is not set" in done.stderr
    for words in flags:  # as the scripts themselves understand them
        folder, _, verb = words[0].partition("/")
        verb = verb.removesuffix(".py") or "train"
        if (ROOT / folder / f"{verb}.py").exists() and (ROOT / folder / "train.py").exists():
            presets = [ROOT / word[1:] for word in words if word.startswith("@")]
            if all(preset.exists() for preset in presets):
                getattr(load(folder, verb), verb).parse(words[1:])


# --- two nodes, here


@pytest.mark.slow
def test_two_nodes_train(place):
    """What train.sbatch starts on two nodes meets and trains: the stand-in runs the real commands on this machine."""
    words = ["fsq_vqvae", *sizes("fsq_vqvae"), "--out", "o"]
    done = place.job(*words, nodes=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert done.returncode == 0, place.log("o")
    assert "2 process(es)" in place.log("o") and curve(place.here / "o") and not whole(place.here / "o")


# --- campaign: a Slurm of one's own


CONF = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
FirstJobId={first}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=9
"""
DAEMONS = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol"]


class Cluster:
    """munged, slurmctld and two slurmd on this machine, in a folder of their own; nothing of the system's is used."""

    def __init__(self, home):
        self.home = home
        for name in ("state", "spool"):
            (home / name).mkdir()
        (home / "munge.key").write_bytes(os.urandom(1024))
        (home / "munge.key").chmod(0o400)
        ports = [free_port() for _ in range(3)]
        first = os.getpid() % 9000 + 1  # a job's number chooses its ports: other numbers than another cluster's here
        (home / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), home=home, ports=ports, first=first))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        more = dict(SLURM_CONF=str(home / "slurm.conf"), PATH=path, OMP_NUM_THREADS="1", MPLBACKEND="Agg")
        self.env = {**os.environ, **more, "MASTER_ADDR": "127.0.0.1", "WANDB_MODE": "offline"}
        key, there = home / "munge.key", f"{home}/munge"
        files = f"--socket {there}.socket --pid-file {there}.pid --log-file {there}.log --seed-file {there}.seed"
        self.call("munged", "--force", "--key-file", key, *files.split())
        self.call("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        until(lambda: "idle" in self.call("sinfo", "-h", "-p", "cpu", "-o", "%t").split(), 60, "the nodes")

    def call(self, *words, cwd=None):
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, check=False, env=self.env, cwd=cwd, timeout=60
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, cwd, *words):
        """(job, OUT) of `sbatch words`."""
        return int(self.call("sbatch", "--parsable", *words, cwd=cwd).split(";")[0])

    def state(self, job):
        shown = self.call("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def finish(self, job, timeout=600):
        """Wait until a job is done; a requeued one is let go after 5 seconds instead of Slurm's two minutes.

        Not at once: a start in the second of the requeue has a credential that slurmd has just revoked.
        """
        hastened = set()

        def ended():
            state = self.state(job)
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime" and state["Restarts"] not in hastened:
                hastened.add(state["Restarts"])
                self.call("scontrol", "update", f"jobid={job}", "starttime=now+5")
            return state["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

        until(ended, timeout, f"job {job}")
        return self.state(job)

    def stop(self):
        for name in ("n1", "n2", "slurmctld", "munge"):
            file = self.home / f"{name}.pid"
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(2)


def until(check, timeout, what):
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in DAEMONS if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"no Slurm here ({', '.join(missing) or 'not root'}): the launch lines were checked in a dry run only"
        )
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


def checkout(tmp_path):
    here = tmp_path / "checkout"
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "wandb"))
    return here


PREEMPT = {
    "scontrol requeue": lambda cluster, job, here: cluster.call("scontrol", "requeue", job),
    "USR1 before the time limit": lambda cluster, job, here: cluster.call("scancel", "--batch", "--signal=USR1", job),
    "a job of an urgent partition": lambda cluster, job, here: cluster.submit(
        here, "--partition", "urgent", "--nodes", 2, "--exclusive", "--output", "urgent.out", "--wrap", "sleep 3"
    ),
}


@pytest.mark.campaign
@pytest.mark.parametrize("folder", READY)
def test_preempted_jobs_finish_with_the_curve_of_an_undisturbed_one(cluster, tmp_path, folder):
    """Two tasks on CPU, preempted in three ways; then two nodes: log and weights are those of a run left alone."""
    here = checkout(tmp_path)
    train = ["slurm/train.sbatch", folder, *sizes(folder, long=True)]
    options = ["--ntasks-per-node", 2]
    job = cluster.submit(here, *options, *train, "--out", "left alone")
    state = cluster.finish(job)
    alone = here / "left alone"
    text = (alone / f"slurm-{job}.log").read_text()
    assert state["JobState"] == "COMPLETED", text[-3000:]
    print(f"\n--- {folder}, left alone, {state['RunTime']}\n{text[:600]}...")
    for number, (way, preempt) in enumerate(PREEMPT.items()):
        out = here / f"preempted {number}"
        job = cluster.submit(here, *options, *train, "--out", out.name)
        until(lambda out=out: list(out.glob("checkpoints/step_*")), 300, "a checkpoint")
        preempt(cluster, job, here)
        state = cluster.finish(job)
        text = (out / f"slurm-{job}.log").read_text()
        assert state["JobState"] == "COMPLETED" and int(state["Restarts"]) >= 1, (way, state, text[-3000:])
        print(f"--- {folder}, {way}: {state['Restarts']} restart(s), {state['RunTime']} after the last\n{text}")
        assert "--resume" in text and weights(out) == weights(alone) and not whole(out), way
        same_curve(out, alone, stops=int(state["Restarts"]))
    nodes = here / "two nodes"
    job = cluster.submit(here, "--nodes", 2, "--ntasks-per-node", 1, *train, "--out", nodes.name)
    state = cluster.finish(job)
    text = (nodes / f"slurm-{job}.log").read_text()
    assert state["JobState"] == "COMPLETED" and state["NumNodes"] == "2", text[-3000:]
    assert curve(nodes) == curve(alone)
    print(f"--- {folder}, two nodes: the same curve, {state['RunTime']}")


@pytest.mark.campaign
def test_an_array_of_seeds(cluster, tmp_path):
    """Two jobs of an array, two folders, two seeds."""
    here = checkout(tmp_path)
    subprocess.run([sys.executable, "fsq_vqvae/demo.py", "--out", "runs/demo/fsq_vqvae"], cwd=here, check=True)
    train = ["slurm/train.sbatch", "fsq_vqvae", *sizes("fsq_vqvae"), "--seed", "%a", "--out", "runs/seed%a"]
    job = cluster.submit(here, "--array", "0-1", *train)
    until(lambda: not cluster.call("squeue", "-h", "-j", job).strip(), 300, "the array")
    one, two = (json.loads((here / f"runs/seed{n}/args.json").read_text())["flags"]["seed"] for n in (0, 1))
    assert (one, two) == (0, 1) and curve(here / "runs/seed0") != curve(here / "runs/seed1")


SMALL = "--batch-size 16 --warmup 2 --log-every 4 --eval-every 12 --save-every 12 --device cpu"
CHAIN = dict(  # flags of the stages for a chain of minutes: the demo's tiny models, few steps
    LAQ=f"@laq/demo.args --gap 4 --dim 32 --stem 16 --val-pairs 32 --steps 24 {SMALL}",
    LABEL="--device cpu",
    VLA=f"--image-size 32 --val-samples 32 --steps 24 {SMALL}",
    FINETUNE=f"--chunk 4 --val-samples 32 --steps 24 {SMALL}",
)
ACT = """import sys
sys.path.insert(0, "vla")
import numpy as np
from policy import Policy
policy = Policy.from_pretrained(sys.argv[1])
policy.reset("push the red block to the left")
print(policy.act(np.zeros((32, 32, 3), np.uint8)).shape)
"""


def submit_chain(cluster, here, **more):
    """The jobs of slurm/lapa.sh on the demo's shards, {name: number}; two processes each but for the labels."""
    paths = dict(VIDEOS="runs/demo/vla", ROBOT="runs/demo/vla/robot", BACKBONE="runs/demo/vla/backbone")
    done = subprocess.run(
        ["bash", "slurm/lapa.sh", "--ntasks-per-node", "2"],
        cwd=here,
        env=cluster.env | CHAIN | paths | more,
        capture_output=True,
        text=True,
        check=True,
    )
    print(done.stdout)
    return {name: int(job) for name, job in re.findall(r"(\w+): job (\d+)", done.stdout)}


@pytest.mark.campaign
def test_the_lapa_chain_ends_in_a_policy(cluster, tmp_path):
    """Four jobs, each after the one before: shards in, a policy that acts out. One that fails cancels what waits."""
    here = checkout(tmp_path)
    write = [sys.executable, "vla/demo.py", "--out", "runs/demo/vla", "--videos", "40", "--demonstrations", "20"]
    subprocess.run(write, cwd=here, check=True)
    jobs = submit_chain(cluster, here, OUT="runs/lapa")
    assert list(jobs) == ["laq", "label", "vla", "finetune"]
    states = {name: cluster.finish(job, 900) for name, job in jobs.items()}
    logs = "".join(path.read_text()[-1500:] for path in [*here.glob("slurm-*.out"), *here.glob("runs/lapa/*/*.log")])
    for name, state in states.items():
        assert state["JobState"] == "COMPLETED", f"{name}: {state['JobState']}\n{logs}"
        print(f"| {name} | {state['StartTime'][11:]} | {state['EndTime'][11:]} | {state['RunTime']} |")
    for first, second in zip(states.values(), list(states.values())[1:], strict=False):
        assert first["EndTime"] <= second["StartTime"]
    best = here / "runs/lapa/robot/checkpoints/best"
    done = subprocess.run(
        [sys.executable, "-c", ACT, best], cwd=here, env=cluster.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and re.match(r"\(\d+,\)", done.stdout), done.stdout + done.stderr
    print(f"the policy's command: {done.stdout}")
    jobs = submit_chain(cluster, here, OUT="runs/broken", LAQ="--no-such-flag")
    states = [cluster.finish(job)["JobState"] for job in jobs.values()]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]


# --- campaign: two hosts, which are two network namespaces


def ip(*words, check=True):
    return subprocess.run(["ip", *map(str, words)], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable: names, and addresses; gone afterwards."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"rl{os.getpid()}{side}" for side in "ab"]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def on_both(hosts, cwd, port, script, words, **more):
    """Start torchrun on each host; returns the two processes. Each writes to CWD/host-N.txt. more: environment."""
    parts = []
    for rank, name in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node_rank", rank, "--master_addr", "10.77.0.1", "--master_port", port, "--nproc_per_node", "1"]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        env |= more
        out = open(cwd / f"host-{rank}.txt", "w")
        words = [str(word) for word in words]
        with out:
            parts.append(
                subprocess.Popen(
                    [*map(str, command), str(script), *words],
                    cwd=cwd,
                    env=env,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )
    return parts


HOSTS = [["fsq_vqvae"], ["vla", "--fsdp"]]


@pytest.mark.campaign
@pytest.mark.parametrize("folder, more", [(name, more) for name, *more in HOSTS if name in READY])
def test_a_host_is_cut_off(hosts, tmp_path, folder, more):
    """Two hosts train, the cable is pulled: both end by themselves within the limit, say why, resume and finish."""
    script, words = ROOT / folder / "train.py", [*sizes(folder, long=True), *more]
    for part in on_both(hosts, tmp_path, 29511, script, [*words, "--out", "alone"]):
        assert part.wait(900) == 0, (tmp_path / "host-0.txt").read_text()[-3000:]
    out = tmp_path / "cut"
    parts = on_both(hosts, tmp_path, 29512, script, [*words, "--out", out.name], DIST_TIMEOUT="20")
    until(lambda: list(out.glob("checkpoints/step_*")), 600, "a checkpoint")
    ip("-n", hosts[1], "link", "set", "cable", "down")
    start = time.monotonic()
    try:
        codes = [part.wait(180) for part in parts]
    except subprocess.TimeoutExpired:
        for part in parts:
            os.killpg(part.pid, signal.SIGKILL)
        pytest.fail(
            "a host hangs:\n" + "\n".join((tmp_path / f"host-{rank}.txt").read_text()[-2000:] for rank in (0, 1))
        )
    seconds = time.monotonic() - start
    said = [(tmp_path / f"host-{rank}.txt").read_text() for rank in (0, 1)]
    assert all(codes) and not whole(out), said
    print(f"\n--- {folder} {more}: cut off; both ended with {codes} after {seconds:.0f} s (limit 20 s)")
    for text in said:
        print("\n".join(line for line in text.splitlines() if re.search("imed out|rror:|eset|closed", line))[-1500:])
    ip("-n", hosts[1], "link", "set", "cable", "up")
    for part in on_both(hosts, tmp_path, 29513, script, [*words, "--out", out.name, "--resume"]):
        assert part.wait(900) == 0, (tmp_path / "host-0.txt").read_text()[-3000:]
    assert weights(out) == weights(tmp_path / "alone")
    same_curve(out, tmp_path / "alone")
