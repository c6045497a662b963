"""slurm/: what train.sbatch starts, and when it is requeued; as a campaign, a local Slurm cluster and two hosts.

The default tests put stand-ins for srun, sbatch and scontrol on the PATH. The campaign starts munged, slurmctld and
two slurmd (Debian: slurm-wlm, munge) as root, and two network namespaces as hosts:
  pytest -m campaign -s tests/campaign/test_slurm.py
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
from conftest import FOLDERS, ROOT, free_port, load, weights_of
from tiny_runs import ENV, assert_same, broken, curve, flags, until

# srun: notes its words, then starts the tasks as Slurm would, here; sbatch and scontrol only note them
SRUN = """#!{python}
import json, os, subprocess, sys
words = sys.argv[1:]
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(["srun", *words]) + "\\n")
if os.environ.get("SRUN"):
    os.execvp("bash", ["bash", "-c", os.environ["SRUN"]])
start = next(i for i, word in enumerate(words) if not word.startswith("--"))
flags = dict(word[2:].partition("=")[::2] for word in words[:start])
tasks, nodes, parts = int(flags["ntasks"]), int(flags["nodes"]), []
for rank in range(tasks):
    node, local = divmod(rank, tasks // nodes)
    more = dict(SLURM_NODEID=node, SLURM_PROCID=rank, SLURM_LOCALID=local, SLURM_NTASKS=tasks)
    env = os.environ | {{name: str(value) for name, value in more.items()}}
    parts.append(subprocess.Popen(words[start:], env=env))
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


def checkout(folder):
    """A copy of the repository for jobs to run in."""
    here = folder / "a checkout"
    shutil.copytree(ROOT, here, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "wandb"))
    return here


class Place:
    """A checkout with the stand-ins on the PATH. `job` runs train.sbatch as Slurm does, as job 77."""

    def __init__(self, scratch):
        self.here, self.bin = checkout(scratch), scratch / "bin"
        self.bin.mkdir()
        for name, text in dict(srun=SRUN, sbatch=NOTE, scontrol=NOTE).items():
            (self.bin / name).write_text(text.format(python=sys.executable))
            (self.bin / name).chmod(0o755)
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = {**keep, **ENV, "PATH": path}

    def start(self, *words, script="slurm/train.sbatch", **env):
        env = self.env | {name: str(value) for name, value in env.items()}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        words = ["bash", script, *map(str, words)]
        return subprocess.Popen(words, cwd=self.here, env=env, start_new_session=True, **pipes)

    def run(self, *words, **more):
        with self.start(*words, **more) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def job(self, *words, nodes=1, **env):
        job = dict(SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=nodes, SLURM_JOB_NODELIST="n[1-2]")
        return self.run(*words, **job | env)

    def calls(self, name):
        file = self.here / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words for program, *words in map(json.loads, lines) if program == name]

    def log(self, out="o"):
        (file,) = (self.here / out).glob("slurm-*.log")
        return file.read_text()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# --- files


def test_files(tmp_path):
    """The scripts are valid bash, the examples of cluster.env too once uncommented, and the images take our torch."""
    for name in ("train.sbatch", "cluster.env", "lapa.sh"):
        subprocess.run(["bash", "-n", ROOT / "slurm" / name], check=True)
    text = (ROOT / "slurm/cluster.env").read_text()
    examples = [line[2:] for line in text.splitlines() if re.match(r"# (export |\w+=|\[ )", line)]
    assert len(examples) >= 8 and not [line for line in text.splitlines() if line and line[0] != "#"]
    (tmp_path / "env").write_text("\n".join(examples))
    subprocess.run(["bash", "-uec", f". {tmp_path}/env"], check=True, env={"USER": "me"})
    pin = re.search(r"^torch(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f'"torch{pin}"' in (ROOT / "slurm/Dockerfile.rocm").read_text()


# --- launch lines


def test_torch_folders_start_one_torchrun_per_node(place):
    """Two nodes of four GPUs: one torchrun on each, all processes meet at the first node on the job's own port.

    MASTER_* of the submitting shell, and flags that give each task one GPU, are not handed on.
    """
    place_env = dict(MASTER_PORT="29500", MASTER_ADDR="elsewhere", SLURM_GPUS_PER_TASK="1", SLURM_GPU_BIND="single:1")
    show = 'echo "seen ${SLURM_GPUS_PER_TASK-}${SLURM_GPU_BIND-} $MASTER_ADDR $MASTER_PORT"'
    words = ["--data", "x y=/a b", "--out", "o p"]
    done = place.job("fsq_vqvae", *words, nodes=2, SLURM_GPUS_ON_NODE=4, SRUN=show, **place_env)
    assert done.returncode == 0 and "seen  first 10154\n" in place.log("o p"), done.stdout + done.stderr
    (words,) = place.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= {*words}
    start = words.index("bash")
    assert words[start + 2] == 'exec python -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"'
    launch = "torchrun --nnodes 2 --nproc_per_node 4 --master_addr first --master_port 10154".split()
    assert words[start + 3 :] == [*launch, "fsq_vqvae/train.py", "--data", "x y=/a b", "--out", "o p"]


def test_jax_joins_its_own_processes(place):
    """vae_distill: one task per GPU, each with torchrun's variables; no torchrun, for this folder needs no torch."""
    (place.here / "vae_distill/train.py").write_text(
        'add("--resume")\nimport json, os, sys\n'.replace("add", "str")
        + "names = 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT'.split()\n"
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
    """As many as GPUs; without any, --ntasks-per-node; cluster.env wins. One process needs no torchrun."""
    assert place.job("fsq_vqvae", "--out", "o", SRUN="true", **env).returncode == 0
    line = " ".join(place.calls("srun")[0])
    alone = line.endswith("--ntasks=1 python fsq_vqvae/train.py --out o")
    assert alone if ranks == 1 else f"--nproc_per_node {ranks}" in line
    assert f"1 x {ranks} process(es)" in place.log()


def test_each_job_has_a_folder_of_its_own(place):
    """Without --out it is the job's number; %a is the number in an array, and an array without it is refused."""
    array = dict(SLURM_ARRAY_JOB_ID=70, SLURM_ARRAY_TASK_ID=3, SRUN="true")
    place.job("fsq_vqvae", SRUN="true")
    place.job("fsq_vqvae", "--seed", "%a", **array)
    place.job("fsq_vqvae", "@sweep/%a.args", "--out", "s/%a_%a", **array)
    one, two, three = place.calls("srun")
    assert one[-2:] == ["--out", "runs/fsq_vqvae/job_77"]
    assert two[-4:] == ["--seed", "3", "--out", "runs/fsq_vqvae/job_70_3"]
    assert three[-3:] == ["@sweep/3.args", "--out", "s/3_3"]
    for words in (["--out", "s"], ["--seed", "%a", "--out", "s"], []):
        done = place.job("fsq_vqvae", *words, **array)
        assert done.returncode == 2 and "%a" in done.stderr and done.stderr.count("\n") == 1


def test_restarts_and_other_scripts(place):
    """A restarted run gets --resume; a script that is no run (laq/label.py) does not, and its --out is left alone."""
    for count in (0, 1, 7):
        place.job("fsq_vqvae", "--out", "o", SLURM_RESTART_COUNT=count, SRUN="true")
        assert place.calls("srun")[-1][-1] == ("--resume" if count else "o")
    assert place.log().count(", start ") == 3  # one file for all starts
    done = place.job("laq/label.py", "--out", "p", SLURM_RESTART_COUNT=1, SRUN="true")
    assert done.returncode == 0 and not (place.here / "p").exists()
    assert place.calls("srun")[-1][-3:] == ["laq/label.py", "--out", "p"]
    for words, text in (([], "expected a folder"), (["lap"], "lap: no such script")):
        done = place.job(*words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and text in done.stderr


def test_container(place):
    """Pyxis gets the image, the checkout at its own path, what cluster.env mounts, and the cache."""
    env = dict(CONTAINER="/i/robot.sqsh", MOUNTS="/data:/data", CACHE="/local/c", SRUN="true")
    for folder, nodes, command in (("fsq_vqvae", 1, "python"), ("fsq_vqvae", 2, "bash"), ("vae_distill", 2, "bash")):
        assert place.job(folder, nodes=nodes, **env).returncode == 0
        words, here = place.calls("srun")[-1], place.here
        mounts = f"--container-mounts={here}:{here},/data:/data,/local/c:/local/c"
        container = ["--container-image=/i/robot.sqsh", mounts, f"--container-workdir={here}"]
        assert words[: words.index(command)][-3:] == container


def test_cache(place):
    """--data and --labels are copied to each node and read there, under the same names; nothing else is."""
    for name in ("d/web", "d/b c", "d/labels"):
        (place.here / name).mkdir(parents=True)
    words = ["--data", "w=d/web", "d/b c", "module:x.py", "--labels", "d/labels", "--init", "d/web", "--out", "o"]
    cache, here = place.here.parent / "cache", place.here.resolve()
    assert place.job("fsq_vqvae", *words, nodes=2, CACHE=cache, SRUN="true").returncode == 0
    copy, train = place.calls("srun")
    assert copy[-4:] == [str(cache), f"{here}/d/web", f"{here}/d/b c", f"{here}/d/labels"]
    there = f"{cache}{here}"
    expected = ["--data", f"w={there}/d/web", f"{there}/d/b c", "module:x.py", "--labels", f"{there}/d/labels"]
    assert train[train.index("--data") :] == [*expected, "--init", "d/web", "--out", "o"]
    done = place.job("fsq_vqvae", *words, CACHE=cache, SRUN="exit 23")
    assert done.returncode == 2 and "no copy of the data" in place.log() and len(place.calls("srun")) == 3
    if shutil.which("rsync"):
        (place.here / "show.py").write_text("import sys\nprint(open(sys.argv[2] + '/a.tar').read())\n")
        for text in ("one", "longer"):  # a second job copies what has changed
            (place.here / "d/b c/a.tar").write_text(text)
            assert f"\n{text}\n" in place.job("show.py", "--data", "d/b c", CACHE=cache).stdout


def test_outside_of_a_job_it_prints(place):
    """Before queueing, the script shows what a job would start."""
    (place.here / "d").mkdir()
    done = place.run("fsq_vqvae", "--data", "d", CACHE="/local", RANKS_PER_NODE=2)
    assert done.returncode == 0 and done.stdout.startswith("not in a Slurm job; one would start:\n")
    assert done.stdout.count("'srun' ") == 2 and "rsync" in done.stdout and not (place.here / "calls.jsonl").exists()


# --- requeue


def asked(place, code, number=signal.SIGUSR1, script="fsq_vqvae"):
    """Exit code of a job that gets a signal while its run waits for OUT/stop and then ends with `code`."""
    wait = f"touch started; until [ -e o/stop ] || [ -e o/now ]; do sleep 0.05; done; exit {code}"
    out = ["--out", "o"] if script == "fsq_vqvae" else []
    job = dict(SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=1, SLURM_JOB_NODELIST="n1", SRUN=wait)
    with place.start(script, *out, **job) as process:
        until((place.here / "started").exists, 60, "the start")
        os.kill(process.pid, number)  # B: the batch shell alone
        if number == signal.SIGTERM:
            time.sleep(0.3)
            (place.here / "o").mkdir(exist_ok=True)
            (place.here / "o" / "now").touch()
        process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("code, requeued", [(75, True), (1, True), (0, False)])
def test_usr1_stops_the_run_and_requeues(place, code, requeued, slow):
    """75 (or torchrun's 1 for it) after Slurm's signal is requeued, a run that was at its end anyway is not; also when
    the run ends while the signal is still being handled."""
    if slow:
        (place.bin / "touch").write_text(f'#!/bin/bash\n{shutil.which("touch")} "$@"\nsleep 1\n')
        (place.bin / "touch").chmod(0o755)
    assert asked(place, code) == code
    assert place.calls("scontrol") == [["requeue", "77"]] * requeued and "is asked to end" in place.log()


def test_other_ends(place):
    """A signal during the copy of the data requeues without a start; a script that is no run is ended and requeued;
    a crash, a user's own OUT/stop and a preemption (Slurm requeues that itself) are not requeued."""
    for code in (1, 2, 75):
        assert place.job("fsq_vqvae", "--out", "o", SRUN=f"exit {code}").returncode == code
    assert asked(place, 75, signal.SIGTERM) == 75  # it waited for the run to save
    assert not place.calls("scontrol")
    (place.here / "started").unlink()
    (place.here / "verb.py").write_text("")
    shutil.rmtree(place.here / "o")
    assert asked(place, 0, script="verb.py") != 0 and place.calls("scontrol") == [["requeue", "77"]]
    (place.here / "started").unlink()
    (place.here / "d").mkdir()
    job, before = dict(SLURM_JOB_ID=77, SLURM_JOB_NUM_NODES=1, SLURM_JOB_NODELIST="n1"), len(place.calls("srun"))
    copy = dict(CACHE="/local", SRUN="touch started; sleep 1")
    with place.start("fsq_vqvae", "--data", "d", "--out", "o", **copy, **job) as process:
        until((place.here / "started").exists, 60, "the copy")
        os.kill(process.pid, signal.SIGUSR1)
        process.communicate(timeout=60)
    assert process.returncode == 75 and len(place.calls("scontrol")) == 2 and len(place.calls("srun")) == before + 1


# --- the LAPA pipeline


def test_lapa_is_a_chain(place):
    """Each stage waits for the one before and reads what it writes; the scripts understand their flags."""
    env = dict(VIDEOS="s/web", ROBOT="s/robot", OUT="o p", BACKBONE="b c")
    done = place.run("--nodes", 2, script="slurm/lapa.sh", **env)
    assert done.returncode == 0, done.stderr
    calls = place.calls("sbatch")
    assert [words[words.index("--job-name") + 1] for words in calls] == ["laq", "label", "vla", "finetune"]
    waits = [re.findall(r"--dependency=(\S+)", " ".join(words)) for words in calls]
    assert waits == [[], ["afterok:101"], ["afterok:102"], ["afterok:103"]]
    assert all("--kill-on-invalid-dep=yes" in words and "--parsable" in words for words in calls)
    assert ["--nodes" in words for words in calls] == [True, False, True, True]
    stages = [words[words.index("slurm/train.sbatch") + 1 :] for words in calls]
    assert [words[0] for words in stages] == ["laq", "laq/label.py", "vla", "vla/finetune.py"]
    for stage, path in zip(stages[1:], ("laq/checkpoints/best", "labels", "vla/checkpoints/best"), strict=True):
        assert f"o p/{path}" in stage
    for name in env:
        done = place.run(script="slurm/lapa.sh", **{key: value for key, value in env.items() if key != name})
        assert done.returncode == 2 and f"{name} is not set" in done.stderr
    for script, *words in stages:
        folder, _, verb = script.partition("/")
        verb = verb.removesuffix(".py") or "train"
        words = [f"@{ROOT / word[1:]}" if word[0] == "@" else word for word in words]
        getattr(load(folder, verb), verb).parse(words)


def test_a_script_that_shares_nothing_out_is_one_process(place):
    """Whatever GPUs the job has: eight of them would refuse each other's folder, or do the work eight times."""
    several = {"laq/videos_to_shards.py": False, "vae_distill/evaluate.py": False, "laq/label.py": True}
    for script, expected in several.items():
        place.job(script, "--out", "p", SLURM_GPUS_ON_NODE=4, SRUN="true")
        words = place.calls("srun")[-1]
        assert ("--nproc_per_node" in " ".join(words)) == expected and "--ntasks=1" in words


@pytest.mark.slow
def test_two_nodes_train(place):
    """What train.sbatch starts on two nodes meets and trains: the stand-in runs the real commands here."""
    (place.here / "here.env").write_text("MASTER_ADDR=127.0.0.1")
    env = dict(CLUSTER_ENV="here.env", SLURM_JOB_ID=os.getpid())
    done = place.job("fsq_vqvae", *flags("fsq_vqvae"), "--out", "o", nodes=2, **env)
    assert done.returncode == 0, place.log()
    assert curve(place.here / "o") and not broken(place.here / "o")


# --- campaign: a local Slurm cluster

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
KillWait=60
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=60 State=UP
GresTypes=gpu
"""


class Cluster:
    """munged, slurmctld and two slurmd on this machine, in a folder of their own; nothing of the system's is used."""

    def __init__(self, home):
        self.home = home
        for name in ("state", "spool"):
            (home / name).mkdir()
        (home / "munge.key").write_bytes(os.urandom(1024))
        (home / "munge.key").chmod(0o400)
        ports = [free_port() for _ in range(3)]
        first = os.getpid() % 9000 + 1  # a job's number chooses its port: other numbers than another cluster's here
        (home / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), home=home, ports=ports, first=first))
        (home / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # two stand-ins
        (home / "cluster.env").write_text("MASTER_ADDR=127.0.0.1\n")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = dict(SLURM_CONF=str(home / "slurm.conf"), CLUSTER_ENV=str(home / "cluster.env"), PATH=path)
        self.env = {**os.environ, **ENV, **own}
        there = f"{home}/munge"
        files = f"--socket {there}.socket --pid-file {there}.pid --log-file {there}.log --seed-file {there}.seed"
        self.call("munged", "--force", "--key-file", home / "munge.key", *files.split())
        self.call("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        until(lambda: "idle" in self.call("sinfo", "-h", "-o", "%t").split(), 60, "the nodes")

    def call(self, *words, cwd=None):
        pipes = dict(capture_output=True, text=True, env=self.env, cwd=cwd, timeout=60)
        done = subprocess.run(list(map(str, words)), **pipes)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, cwd, *words):
        return int(self.call("sbatch", "--parsable", *words, cwd=cwd).split(";")[0])

    def finish(self, job, timeout=900):
        """The state of a job once it is done; a requeued one is let go after 5 seconds, not after Slurm's two minutes.

        Not at once: a start in the second of the requeue has a credential that slurmd has just revoked.
        """
        hastened, state = set(), {}

        def ended():
            state.update(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))
            if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime" and state["Restarts"] not in hastened:
                hastened.add(state["Restarts"])
                self.call("scontrol", "update", f"jobid={job}", "starttime=now+5")
            return state["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")

        until(ended, timeout, f"job {job}")
        return state

    def stop(self):
        for name in ("n1", "n2", "slurmctld", "munge"):
            if (self.home / f"{name}.pid").exists():
                os.kill(int((self.home / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm here ({', '.join(missing) or 'not root'}): only the launch lines were checked")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


REQUEUE = {  # by an administrator or a preemption; as before the time limit, when the script is asked
    "scontrol requeue": ["scontrol", "requeue"],
    "USR1": ["scancel", "--batch", "--signal=USR1"],
}


@pytest.mark.campaign
@pytest.mark.parametrize("folder", FOLDERS)
def test_requeued_jobs_end_as_the_undisturbed_one(cluster, tmp_path, folder):
    """Two processes, requeued in two ways, and two nodes: log and weights are those of the undisturbed job."""
    here = checkout(tmp_path)
    train = ["slurm/train.sbatch", folder, *flags(folder, long=True)]

    def finished(job, out, restarts=0):
        state = cluster.finish(job)
        text = (here / out / f"slurm-{job}.log").read_text()
        assert state["JobState"] == "COMPLETED" and int(state["Restarts"]) >= restarts, (state, text[-3000:])
        print(f"| {folder} | {out} | {state['Restarts']} restart(s) | {state['RunTime']} after the last |", flush=True)
        return int(state["Restarts"])

    finished(cluster.submit(here, "--ntasks-per-node", 2, *train, "--out", "alone"), "alone")
    for way, command in REQUEUE.items():
        out = here / way
        job = cluster.submit(here, "--ntasks-per-node", 2, *train, "--out", way)
        until(lambda out=out: list(out.glob("checkpoints/step_*")), 300, "a checkpoint")
        cluster.call(*command, job)
        assert_same(out, here / "alone", stops=finished(job, way, restarts=1))
    finished(cluster.submit(here, "--nodes", 2, "--ntasks-per-node", 1, *train, "--out", "two nodes"), "two nodes")
    assert curve(here / "two nodes") == curve(here / "alone")


@pytest.mark.campaign
@pytest.mark.parametrize("options", ["--gpus-per-node=2", "--gpus-per-task=1", "--gpus-per-node=2 --gpu-bind=single:1"])
@pytest.mark.parametrize("folder", ["fsq_vqvae", "vae_distill"])
def test_each_process_sees_all_gpus_of_its_node(cluster, tmp_path, folder, options):
    """However the job asks for them: a process takes the one of its local rank."""
    here = checkout(tmp_path)
    show = 'import os\nprint("sees {CUDA_VISIBLE_DEVICES} {LOCAL_RANK}\\n".format(**os.environ), end="")\n'
    (here / folder / "train.py").write_text(f'"--resume"\n{show}')
    options = options.split() + ["--ntasks-per-node=2"] * ("task" in options)
    job = cluster.submit(here, *options, "slurm/train.sbatch", folder, "--out", "o")
    state, text = cluster.finish(job), (here / f"o/slurm-{job}.log").read_text()
    assert state["JobState"] == "COMPLETED" and "sees 0,1 0" in text and "sees 0,1 1" in text, text


SMALL = "--batch-size 16 --warmup 2 --log-every 4 --eval-every 12 --save-every 12 --device cpu"
CHAIN = dict(  # flags of the stages for a chain of minutes: the demo's tiny models, few steps
    LAQ=f"@laq/demo.args --gap 4 --dim 32 --val-pairs 32 --steps 24 {SMALL}",
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


@pytest.mark.campaign
def test_the_lapa_chain_ends_in_a_policy(cluster, tmp_path):
    """Four jobs, each after the one before: shards in, a policy that acts out. One that fails cancels what waits."""
    here = checkout(tmp_path)
    write = [sys.executable, "vla/demo.py", "--out", "runs/demo/vla", "--videos", "40", "--demonstrations", "20"]
    subprocess.run(write, cwd=here, check=True)
    paths = dict(VIDEOS="runs/demo/vla", ROBOT="runs/demo/vla/robot", BACKBONE="runs/demo/vla/backbone")

    def submit(**more):
        words, env = ["bash", "slurm/lapa.sh", "--ntasks-per-node", "2"], cluster.env | CHAIN | paths | more
        text = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True, check=True).stdout
        return [int(job) for job in re.findall(r": job (\d+)", text)]

    states = [cluster.finish(job) for job in submit(OUT="runs/lapa")]
    logs = "".join(path.read_text()[-1500:] for path in [*here.glob("slurm-*.out"), *here.glob("runs/lapa/*/*.log")])
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 4, logs
    print("lapa.sh, seconds of each stage:", [state["RunTime"] for state in states])
    assert all(a["EndTime"] <= b["StartTime"] for a, b in zip(states, states[1:], strict=False))
    words = [sys.executable, "-c", ACT, here / "runs/lapa/robot/checkpoints/best"]
    done = subprocess.run(words, cwd=here, env=cluster.env, capture_output=True, text=True)
    assert done.returncode == 0 and re.match(r"\(\d+,\)", done.stdout), done.stdout + done.stderr
    states = [cluster.finish(job)["JobState"] for job in submit(OUT="runs/broken", LAQ="--no-such-flag")]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]


# --- campaign: two hosts, which are two network namespaces


def ip(*words, check=True):
    subprocess.run(["ip", *map(str, words)], check=check, capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable: names; gone afterwards."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"rl{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def on_both(hosts, cwd, port, words, **env):
    """torchrun on each host: the two processes, which write to CWD/host-N.txt."""
    env, parts = {**os.environ, **ENV, "GLOO_SOCKET_IFNAME": "cable", **env}, []
    for rank, name in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node_rank={rank}", "--master_addr=10.77.0.1", f"--master_port={port}", "--nproc_per_node=1"]
        with open(cwd / f"host-{rank}.txt", "w") as out:
            pipes = dict(cwd=cwd, env=env, stdout=out, stderr=out, start_new_session=True)
            parts.append(subprocess.Popen([*command, *map(str, words)], **pipes))
    return parts


@pytest.mark.campaign
def test_a_host_is_cut_off(hosts, tmp_path):
    """The cable is pulled: both hosts end by themselves within DIST_TIMEOUT, resume and finish."""
    words, out = [ROOT / "fsq_vqvae" / "train.py", *flags("fsq_vqvae", long=True), "--out"], tmp_path / "cut"
    said = lambda: "\n".join((tmp_path / f"host-{rank}.txt").read_text()[-2000:] for rank in (0, 1))  # noqa: E731
    for part in on_both(hosts, tmp_path, 29511, [*words, "alone"]):
        assert part.wait(900) == 0, said()
    parts = on_both(hosts, tmp_path, 29512, [*words, "cut"], DIST_TIMEOUT="20")
    until(lambda: list(out.glob("checkpoints/step_*")), 600, "a checkpoint")
    ip("-n", hosts[1], "link", "set", "cable", "down")
    start = time.monotonic()
    try:
        codes = [part.wait(180) for part in parts]
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
    print(f"\nboth hosts ended with {codes} after {time.monotonic() - start:.0f} s (limit 20 s)")
    assert all(codes) and not broken(out), said()
    ip("-n", hosts[1], "link", "set", "cable", "up")
    for part in on_both(hosts, tmp_path, 29513, [*words, "cut", "--resume"]):
        assert part.wait(900) == 0, said()
    assert weights_of(out) == weights_of(tmp_path / "alone") and list(curve(out)) == list(curve(tmp_path / "alone"))
