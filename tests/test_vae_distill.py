"""vae_distill: the teacher's checkpoints, clips, the rebuilt task, the student's losses, an iteration, whole runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# four devices to divide environments over, and a compiler that does not spend a minute on each tiny program
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", FLAGS + " --xla_llvm_disable_expensive_passes=true")

import h5py  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import ROOT, launch, load, log_of, shared  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

from common import DataError  # noqa: E402

ARM = """<mujoco><option timestep="0.01"><flag eulerdamp="disable"/></option><worldbody>
<body name="link"><joint name="swing" axis="0 1 0" damping="0.1" armature="0.01"/>
<geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.02" mass="0.5"/>
<body name="hand" pos="0.3 0 0"><geom size="0.03" mass="0.05"/></body></body></worldbody>
<actuator><motor joint="swing" gear="5" ctrllimited="true" ctrlrange="-1 1"/></actuator></mujoco>"""
BUG = """<mujoco><worldbody><body name="NAME" pos="0 0 0.1"><freejoint name="root"/><geom size="0.02" mass="0.1"/>
<body name="femur" pos="0.03 0 0"><joint name="hip" axis="0 0 1"/><geom size="0.01" mass="0.01"/>
<body name="tibia" pos="0.04 0 0"><joint name="knee" axis="0 1 0"/><geom size="0.01" mass="0.01"/></body></body>
</body></worldbody><actuator><motor joint="hip"/><motor joint="knee"/></actuator></mujoco>"""
CHECKPOINTS = ["g1_flat_init", "layout_g2_dict", "layout_g3_nested"]


@pytest.fixture(scope="module")
def this():
    top = load("vae_distill", *"env distill policy export demo evaluate metrics reuse".split(), *TEACHER)
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in vars(top).items()})


TEACHER = ["teacher.checkpoint", "teacher.walker", "teacher.arm"]


@pytest.fixture(scope="module")
def arm(this, tmp_path_factory):
    """A pendulum with 8 clips of 30 frames at 50 Hz and a teacher of random weights, on disk and read."""
    folder = tmp_path_factory.mktemp("arm")
    rng = np.random.default_rng(0)
    (folder / "walker.xml").write_text(ARM)
    model = mujoco.MjModel.from_xml_string(ARM)
    t = np.arange(30)[:, None] / 50
    qpos = np.stack([0.5 + 0.4 * np.sin(rng.uniform(2, 6) * t + rng.uniform(0, 6)) for _ in range(8)])
    this.demo.write_clips(folder / "clips.h5", model, qpos)
    words = [f"arm={folder / 'clips.h5'}"]
    clips = this.data.read_clips(words, model, 50, 0.25)
    config = this.arm.describe(model, clips, 50, 2)
    env = this.env.Imitation(config, this.walker.build_model(folder / "walker.xml", config), clips, physics="mujoco")
    encoder, decoder = this.model.Encoder((16,), this.model.gaussian_heads(4)), this.model.Decoder((16,), 2)
    own = env.obs_size - env.reference_size
    params = dict(
        encoder=jax.jit(encoder.init)(jax.random.key(1), jnp.zeros(env.reference_size))["params"],
        decoder=jax.jit(decoder.init)(jax.random.key(2), jnp.zeros(4 + own))["params"],
    )
    mean, std = (rng.uniform(0.1, 1, env.obs_size).astype(np.float32) for _ in range(2))
    config["network_config"] = dict(arch_name="intention", reference_obs_size=env.reference_size)
    this.checkpoint.write_teacher(folder / "teacher", 3, config, mean, std, params)
    teacher = this.checkpoint.read_teacher(folder / "teacher")
    return SimpleNamespace(folder=folder, words=words, clips=clips, env=env, teacher=teacher, qpos=qpos, config=config)


def student_of(this, arm, **more):
    sizes = dict(latent_dim=3, encoder_hidden_sizes=[8], decoder_hidden_sizes=[8], prior_hidden_sizes=[8])
    own = arm.env.obs_size - arm.env.reference_size
    config = this.model.StudentConfig(arm.env.reference_size, own, 1, **{**sizes, "teacher": arm.config, **more})
    return this.model.Student(config, arm.teacher.mean, arm.teacher.std)


# --- the teacher's checkpoint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_actions_of_all_layouts_also_when_saved_on_a_gpu(this, tmp_path, name):
    """Actions are track-mjx's own, recorded."""
    source = shared("trackmjx") / "checkpoints"
    shutil.copytree(source / name, tmp_path / name)
    for file in tmp_path.rglob("_sharding"):
        file.write_text(file.read_text().replace("TFRT_CPU_0", "cuda:0"))
    golden = np.load(source / "g1_flat_init_golden_actions.npz")
    teacher = this.checkpoint.read_teacher(tmp_path / name)
    action, latent = this.model.intention(
        teacher.params, (golden["obs"] - teacher.mean) / teacher.std, teacher.reference_size
    )
    assert np.abs(action - golden["action"]).max() < 1e-5 and np.abs(latent - golden["latent_mean"]).max() < 1e-5
    assert (teacher.reference_size, teacher.action_size) == (470, 38)


def test_written_teacher_reads_back_and_the_newest_step_wins(this, arm, tmp_path):
    teacher = arm.teacher
    for step in (9, 10):  # as text, 9 sorts after 10
        this.checkpoint.write_teacher(tmp_path, step, teacher.config, teacher.mean + step, teacher.std, teacher.params)
    again = this.checkpoint.read_teacher(tmp_path)
    assert again.path.name == "PPONetwork_10" and again.layout == "flat" and again.config == teacher.config
    np.testing.assert_array_equal(again.mean, teacher.mean + 10)
    jax.tree.map(np.testing.assert_array_equal, again.params, teacher.params)
    assert this.checkpoint.read_teacher(tmp_path / "PPONetwork_9").path.name == "PPONetwork_9"
    config = {**arm.config, "network_config": {**arm.config["network_config"], "normalize_observations": False}}
    this.checkpoint.write_teacher(tmp_path, 11, config, teacher.mean, teacher.std, teacher.params)
    plain = this.checkpoint.read_teacher(tmp_path)
    assert not plain.mean.any() and (plain.std == 1).all()


def test_a_path_is_a_path_whatever_its_letters(this, arm, tmp_path):
    """%, # and ? are part of a folder's name; its sibling `run A` is another teacher."""
    teacher, names = arm.teacher, ("run A", "run%20A", "a#b?c")
    for i, name in enumerate(names):
        this.checkpoint.write_teacher(tmp_path / name, 0, teacher.config, teacher.mean + i, teacher.std, teacher.params)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(this.checkpoint.read_teacher(tmp_path / name).mean, teacher.mean + i)


DAMAGES = {
    "no PPONetwork_<step> folder": lambda step: shutil.rmtree(step),
    "`policy` is missing": lambda step: shutil.rmtree(step / "policy"),
    "network_config": lambda step: shutil.rmtree(step / "config"),
    "'recurrent_intention'": lambda step: swap(step / "config/metadata", '"intention"', '"recurrent_intention"'),
    "missing or damaged": lambda step: [file.write_bytes(b"x" * 20) for file in step.glob("policy/**/d/*")],
    "_METADATA": lambda step: (step / "policy/_METADATA").write_text('{"tree'),
    "decoder/hidden_0 is missing": lambda step: without_decoder(step / "policy/_METADATA"),
    "0.mittel is missing or damaged": lambda step: swap(step / "policy/_METADATA", '"key": "mean"', '"key": "mittel"'),
}


def swap(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def without_decoder(file):
    table = json.loads(file.read_text())
    rows = table["tree_metadata"].items()
    file.write_text(json.dumps({**table, "tree_metadata": {name: row for name, row in rows if "decoder" not in name}}))


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_teachers_are_named(this, arm, tmp_path, message):
    shutil.copytree(arm.folder / "teacher", tmp_path / "teacher")
    DAMAGES[message](tmp_path / "teacher" / "PPONetwork_3")
    with pytest.raises(DataError, match=message):
        this.checkpoint.read_teacher(tmp_path / "teacher")


def test_teacher_of_another_walker_is_refused(this, arm):
    def config(*path, value=None):
        """The arm's configuration with one entry replaced, or deleted."""
        made = node = json.loads(json.dumps(arm.config))
        for key in path[:-1]:
            node = node[key]
        node.update({path[-1]: value}) if value else node.pop(path[-1])
        return made

    joints = ("walker_config", "joint_names")
    env = this.env.Imitation(config(*joints, value=["swing", "swing"]), arm.env.model, arm.clips)
    with pytest.raises(DataError, match="another walker's teacher"):
        env.check(arm.teacher)
    for path, value in (("mocap_hz", "fast"), ("iterations", -1), ("reset_noise_scale", "x")):
        with pytest.raises(DataError, match=f"`env_config.env_args.{path}` {value!r}"):
            this.walker.build_model(arm.folder / "walker.xml", config("env_config", "env_args", path, value=value))
    for wrong, message in (
        (config(*joints, value=["knee"]), "no joint 'knee'"),
        (config("env_config", "reward_weights", "bad_pose_dist"), "no `env_config.reward_weights.bad_pose_dist`"),
    ):
        with pytest.raises(DataError, match=message):
            this.env.Imitation(wrong, arm.env.model, arm.clips)
    for wrong, message in (
        (config("env_config", value=dict(reward_terms=dict(root_pos=1.0))), "vnl-playground's, which are not rebuilt"),
        (config("reference_config"), "no `reference_config.traj_length`"),
    ):
        with pytest.raises(DataError, match=message):
            this.walker.build_model(arm.folder / "walker.xml", wrong)


# --- clips


def rewrite(file, **arrays):
    """Datasets of an h5 file replaced; None deletes."""
    with h5py.File(file, "r+") as h5:
        for name, value in arrays.items():
            del h5[name]
            if value is not None:
                h5[name] = value


@pytest.fixture
def copied(arm, tmp_path):
    """A copy of the arm's clips, to be spoilt."""
    return Path(shutil.copy(arm.folder / "clips.h5", tmp_path / "clips.h5"))


def test_both_layouts_read_to_the_same_clips(this, arm, tmp_path):
    with h5py.File(tmp_path / "clips.h5", "w") as h5:
        group = h5.create_group("all_clips")
        group["position"], group["quaternion"] = np.zeros((8, 30, 0)), np.zeros((8, 30, 0))
        group["joints"], group["body_positions"] = arm.qpos, arm.clips.xpos
    again = this.data.read_clips([f"arm={tmp_path}"], arm.env.model, 50, 0.25)
    for name in ("qpos", "qvel", "xpos", "length", "held_out"):
        np.testing.assert_array_equal(getattr(again, name), getattr(arm.clips, name))
    assert again.ids == arm.clips.ids and again.bodies == [] and arm.clips.bodies == ["world", "link", "hand"]


def test_qvel_that_is_empty_or_saturated_is_recomputed_and_a_good_one_kept(this, arm, copied):
    true = np.diff(arm.qpos, axis=1) * 50
    np.testing.assert_allclose(arm.clips.qvel[:, :-1], true, atol=1e-3)
    assert "qvel of 8 clips" in arm.clips.notes[0]  # demo.write_clips leaves it empty
    for qvel, recomputed in ((arm.clips.qvel * 1.02, 0), (np.full((8, 30, 1), 20.0), 1)):  # noisy, saturated
        rewrite(copied, qvel=qvel.reshape(-1, 1))
        clips = this.data.read_clips([str(copied)], arm.env.model, 50)
        assert len(clips.notes) == recomputed
        np.testing.assert_allclose(clips.qvel, arm.clips.qvel * (1 if recomputed else 1.02), rtol=1e-4)


def test_real_mouse_clips(this):
    """Their qvel is saturated at 20 rad/s; the model without meshes gives their body positions."""
    folder = shared("trackmjx") / "mouse_arm"
    model = mujoco.MjModel.from_xml_path(str(folder / "akira_torque_nomesh.xml"))
    clips = this.data.read_clips([f"mouse={folder}"], model, 200)
    assert clips.qpos.shape == (12, 100, 4) and len(clips.notes) == 12 and 1 <= clips.held_out.sum() <= 4
    np.testing.assert_allclose(this.walker.positions(model, clips.qpos[3]), clips.xpos[3], atol=1e-5)
    np.testing.assert_allclose(clips.qvel[:, :-1], np.diff(clips.qpos, axis=1) * 200, atol=1e-2)


def test_the_split_belongs_to_the_clip(this, arm, copied, tmp_path):
    """The same clips are held out under another source name, beside other data, and from another folder."""
    shutil.copy(copied, tmp_path / "more.h5")

    def held_out(*words):
        clips = this.data.read_clips([str(word) for word in words], arm.env.model, 50, 0.25)
        return {name for name in np.array(clips.ids)[clips.held_out] if name.startswith("clips")}

    assert held_out(*arm.words) == held_out(f"other={copied}")
    assert held_out(*arm.words) == held_out(*arm.words, tmp_path / "more.h5")
    assert 1 <= len(held_out(*arm.words)) <= 4


def test_two_files_of_one_name_are_two(this, arm, tmp_path):
    """Their clips have names of their own, and --val-episodes tells them apart: a file, a clip, a range of clips."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(arm.folder / "clips.h5", tmp_path / folder / "clips.h5")

    def held_out(*wanted):
        words = [f"x={tmp_path / 'a'}", f"y={tmp_path / 'b'}"]
        clips = this.data.read_clips(words, arm.env.model, 50, 0.25, wanted)
        assert len(set(clips.ids)) == 16
        return [clips.ids[i] for i in np.flatnonzero(clips.held_out)]

    assert held_out("a/clips.h5/3", "b/clips.h5/0-1") == ["a/clips.h5/3", "b/clips.h5/0", "b/clips.h5/1"]
    assert held_out("b/clips.h5") == [f"b/clips.h5/{i}" for i in range(8)]
    assert held_out("y=01-02,7") == [f"b/clips.h5/{i}" for i in (1, 2, 7)]
    assert held_out("5") == ["a/clips.h5/5", "b/clips.h5/5"]
    for nobody in ("nobody", "²", "-3"):
        with pytest.raises(DataError, match=f"--val-episodes {nobody}: there is no clip {nobody}"):
            held_out(nobody)


def test_clips_whose_frames_changed_are_told(this, arm, copied):
    clips = this.data.read_clips([str(copied)], arm.env.model, 50)
    split = json.loads(json.dumps(this.data.split_of(clips)))
    assert this.data.restore_split(clips, split) == ""
    rewrite(copied, qpos=arm.qpos[::-1].reshape(-1, 1), xpos=arm.clips.xpos[::-1].reshape(-1, 3, 3))
    again = this.data.read_clips([str(copied)], arm.env.model, 50)
    assert "0 new (trained on), 0 gone, 8 with other frames" in this.data.restore_split(again, split)
    del split["checksums"]
    assert this.data.restore_split(again, split) == ""


def test_the_demo_replaces_nothing_but_a_demo(this, tmp_path):
    (tmp_path / "chapter").write_text("x")
    for path in (tmp_path, tmp_path / "chapter"):
        with pytest.raises(DataError, match="no demo's data"):
            this.demo.write(path)
    with pytest.raises(DataError, match="cannot be written"):
        this.demo.write(tmp_path / "chapter" / "x")


def test_files_are_found_behind_links_and_hidden_ones_are_not(this, arm, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("disk/far.H5", "data/near.h5", "data/._near.h5"):
        shutil.copy(arm.folder / "clips.h5", tmp_path / name)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "data")
    clips = this.data.read_clips([str(tmp_path / "data")], arm.env.model, 50)
    assert {name.partition("/")[0] for name in clips.ids} == {"far", "near"} and len(clips.ids) == 16


def test_a_trailing_partial_clip_is_left_out_by_name(this, arm, copied):
    rewrite(copied, qpos=arm.qpos.reshape(-1, 1)[:70], xpos=arm.clips.xpos.reshape(-1, 3, 3)[:70])
    clips = this.data.read_clips([str(copied)], arm.env.model, 50)
    assert clips.qpos.shape == (2, 30, 1) and f"{copied}: the last 10 frames" in clips.notes[0]


def unwritten(file, rows):
    """qpos with chunks that were never written."""
    rewrite(file, qpos=None)
    with h5py.File(file, "r+") as h5:
        h5.create_dataset("qpos", (240, 1), "f8", chunks=(30, 1))[:100] = 0


def virtual(file, rows):
    """qpos as a virtual dataset whose source is gone."""
    rewrite(file, qpos=None)
    layout = h5py.VirtualLayout((240, 1), "f8")
    layout[:] = h5py.VirtualSource(str(file.with_name("gone.h5")), "qpos", (240, 1))
    with h5py.File(file, "r+") as h5:
        h5.create_virtual_dataset("qpos", layout)


SPOILT = {
    "clip 1: qpos holds NaN .* at frame 10": lambda file, rows: rewrite(
        file, qpos=rows * np.where(np.arange(240) < 40, 1, np.inf)[:, None]
    ),
    r"\(30, 3\), the walker \(frames, 1\)": lambda file, rows: rewrite(file, qpos=np.zeros((240, 3))),
    "clips of 1 frame": lambda file, rows: rewrite(file, qpos=rows[:1], config=None),
    "`qpos` is empty": lambda file, rows: rewrite(file, qpos=rows[:0]),
    "neither stac-mjx": lambda file, rows: rewrite(file, qpos=None),
    "not readable as reference clips": lambda file, rows: file.write_bytes(b"hello"),
    "an empty file": lambda file, rows: file.write_bytes(b""),
    "git lfs pull": lambda file, rows: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "chunks of `qpos` were never written": unwritten,
    "gone.h5 is not there": virtual,
    "kinematics put body": lambda file, rows: rewrite(file, qpos=np.degrees(rows)),
    "complex128": lambda file, rows: rewrite(file, qpos=rows + 1j),
    r"`xpos` has shape \(9, 3, 3\), but `qpos` has 240": lambda file, rows: rewrite(file, xpos=np.zeros((9, 3, 3))),
    r"xpos has shape \(30, 9\)": lambda file, rows: rewrite(file, xpos=np.zeros((240, 9))),
    "names_xpos names 4 bodies": lambda file, rows: rewrite(file, names_xpos=["world", "link", "hand", "hand"]),
}


@pytest.mark.parametrize("message", SPOILT)
def test_spoiled_clips_are_named(this, arm, tmp_path, message):
    file = tmp_path / "clips \u00e9.h5"
    shutil.copy(arm.folder / "clips.h5", file)
    SPOILT[message](file, arm.qpos.reshape(-1, 1))
    with pytest.raises(DataError, match=message) as raised:
        this.data.read_clips([f"arm={file}"], arm.env.model, 50)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_another_process_writes_is_told_from_a_broken_one(this, arm, copied):
    code = "import sys, time, h5py; f = h5py.File(sys.argv[1], 'a'); print('open', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, copied], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        try:
            with pytest.raises(DataError, match="clips.h5: another process has it open.*HDF5_USE_FILE_LOCKING"):
                this.data.read_clips([str(copied)], arm.env.model, 50)
        finally:
            writer.kill()


@pytest.fixture(scope="module")
def bug(this, tmp_path_factory):
    """A free walker of three bodies with one clip: its model, the file, and (qpos, xpos)."""
    model = mujoco.MjModel.from_xml_string(BUG)
    t = np.arange(20)[:, None] / 50
    turn = np.roll(Rotation.from_rotvec(t * [0.3, 1, 2]).as_quat(), 1, -1)
    qpos = np.concatenate([t * [1, 0, 0] + [0, 0, 0.1], turn, np.sin(4 * t) + [0.3, 0.6]], -1)
    file = tmp_path_factory.mktemp("bug") / "clips.h5"
    this.demo.write_clips(file, model, qpos[None])
    rewrite(file, names_qpos=["root"] * 7 + ["hip", "knee"])
    return model, file, qpos


@pytest.mark.parametrize("kind", ["w last", "swapped joints", "degrees", "larger walker"])
def test_clips_of_another_convention_are_refused(this, bug, tmp_path, kind):
    """The walker's kinematics must reproduce the clips' body positions; right files, with prefixed names too, do."""
    model, file, qpos = bug
    shutil.copy(file, tmp_path / "clips.h5")
    bodies = ["world", *(f"bug/{name}" for name in ("NAME", "femur", "tibia"))]
    rewrite(tmp_path / "clips.h5", names_qpos=["bug/root"] * 7 + ["bug/hip", "bug/knee"], names_xpos=bodies)
    assert len(this.data.read_clips([str(tmp_path)], model, 50).ids) == 1
    rows = qpos.copy()
    rows[:, 3:7] = np.roll(rows[:, 3:7], -1, -1) if kind == "w last" else rows[:, 3:7]
    rows[:, 7:] = rows[:, :6:-1] if kind == "swapped joints" else rows[:, 7:]
    rows[:, 7:] = np.degrees(rows[:, 7:]) if kind == "degrees" else rows[:, 7:]
    rewrite(tmp_path / "clips.h5", qpos=rows)
    if kind == "larger walker":
        model = mujoco.MjModel.from_xml_string(BUG.replace("0.04 0 0", "0.05 0 0"))
    with pytest.raises(DataError, match="clips.h5, clip 0: the walker's kinematics put body"):
        this.data.read_clips([str(tmp_path)], model, 50)


def test_clips_of_another_body_or_joint_order(this, arm, copied):
    """Bodies are found by name, so another order gives the same reference; a body that is not there is an error."""
    rewrite(copied, names_xpos=["hand", "link", "world"], xpos=arm.clips.xpos.reshape(-1, 3, 3)[:, ::-1])
    clips = this.data.read_clips([f"arm={copied}"], arm.env.model, 50, 0.25)
    env = this.env.Imitation(arm.config, arm.env.model, clips)
    jax.tree.map(np.testing.assert_array_equal, env.reference, arm.env.reference)
    rewrite(copied, names_xpos=["foot", "link", "world"])
    clips = this.data.read_clips([f"arm={copied}"], arm.env.model, 50, 0.25)
    with pytest.raises(DataError, match="no body 'hand'"):
        this.env.Imitation(arm.config, arm.env.model, clips)
    with pytest.raises(DataError, match="names_xpos differs"):
        this.data.read_clips([str(arm.folder / "clips.h5"), str(copied)], arm.env.model, 50)


# --- the task


def test_golden_observations_and_rewards_of_the_rodent(this):
    """All 696 numbers and 18 reward terms as track-mjx's own environment gave them, from the state of C MuJoCo."""
    source = shared("trackmjx")
    teacher = this.checkpoint.read_teacher(source / "checkpoints" / "g1_flat_init")
    model = this.walker.build_model(source / "rodent" / "rodent.xml", teacher.config)
    clips = this.data.read_clips([f"rat={source / 'rodent' / 'rodent_mocap_4x250.h5'}"], model, 50)
    env = this.env.Imitation(teacher.config, model, clips)
    env.check(teacher)
    golden, data, seen = np.load(source / "checkpoints" / "golden_env_obs_reward.npz"), mujoco.MjData(model), 0
    for i in range(3):
        data.qpos, data.qvel, data.ctrl = golden["qpos"][i], golden["qvel"][i], 0
        mujoco.mj_forward(model, data)
        actions = np.zeros((env.window, model.nu), np.float32)
        actions[-1] = golden["ctrl"][i]
        frame = golden["start_frame"][i] + round(golden["time"][i] * 50)
        state = this.env.State(clip=golden["clip_idx"][i], start=frame, age=0, actions=actions)
        state = jax.tree.map(lambda x: np.asarray(x, np.float32 if np.ndim(x) else None), state.with_physics(data))
        assert np.abs(env.get_obs(state) - golden["obs"][i]).max() < 1e-5
        terms = env.reward(state)
        for name, value in zip(golden["reward_names"].tolist(), golden["reward_terms"][i], strict=True):
            ours = float(terms[name]) * (-1 if name.endswith("cost") else 1)
            assert ours == pytest.approx(value, abs=1e-5), name
            seen += 1
    assert seen == 54
    without = this.env.Imitation(teacher.config, model, clips, body_shift="0")
    assert env.shift == 1 and without.shift == 0
    apart = np.abs(without.get_obs(state) - golden["obs"][2])
    assert 1e-3 < apart[:470].max() and apart[470:].max() < 1e-5  # the switch is felt where the bodies are


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torso", "shell"])
def test_the_root_of_any_free_walker_is_seen_and_may_fall(this, arm, bug, tmp_path, name):
    """The root is the body that track-mjx's walkers name, else the body of the free joint, never the world."""
    (tmp_path / "bug.xml").write_text(BUG.replace("NAME", name))
    shutil.copy(bug[1], tmp_path / "clips.h5")
    rewrite(tmp_path / "clips.h5", names_xpos=["world", name, "femur", "tibia"])
    config = json.loads(json.dumps(arm.config))
    config["env_config"]["reward_weights"] |= dict(
        too_far_dist=1e3, bad_quat_dist=9.0, healthy_z_range=[0.05, 0.5], penalty_pos_distance_scale=[1, 1, 1]
    )
    names = dict(joint_names=["hip", "knee"], body_names=[name, "tibia"], end_eff_names=["tibia"])
    config["walker_config"] |= names
    model = this.walker.build_model(tmp_path / "bug.xml", config)
    env = this.env.Imitation(config, model, this.data.read_clips([str(tmp_path)], model, 50))
    assert model.body(env.root).name == name
    for height, fallen in ((0.2, 0), (0.01, 1)):
        qpos = bug[2][3].copy()
        qpos[2] = height
        state = env.state_at(jnp.array(qpos), jnp.zeros(8), 0, 3)
        assert float(env.reward(state)["fall"]) == fallen
        obs = np.asarray(env.get_obs(state))
        assert len(obs) == env.obs_size and obs[env.reference_size + 2 + 2 + 8] == pytest.approx(height, abs=1e-6)


def test_rotations_match_scipy(this):
    rng = np.random.default_rng(0)
    a, b, v = Rotation.random(5, rng), Rotation.random(5, rng), rng.normal(size=(7, 3))

    def wxyz(rotation):
        return np.roll(rotation.as_quat(), 1, -1)

    np.testing.assert_allclose(this.env.rotate(v, jnp.array(wxyz(a[0]))), a[0].apply(v), atol=1e-5)
    relative = this.env.relative_quat(jnp.array(wxyz(b)), jnp.array(wxyz(a[0])))
    expected = wxyz(a[0] * b.inv())
    sign = np.sign((relative * expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(relative * sign, expected, atol=1e-5)
    for i in range(5):
        angle = (a[i] * b[i].inv()).magnitude()
        ours = this.env.bounded_angle(jnp.array(wxyz(a[i])), jnp.array(wxyz(b[i])))
        assert float(ours) == pytest.approx(angle / 2, abs=1e-3)


@pytest.mark.parametrize("physics", [pytest.param("mjx", marks=pytest.mark.slow), "mujoco"])
def test_steps_are_those_of_mujoco_and_the_reward_is_written_out(this, arm, physics):
    env = this.env.Imitation(arm.config, arm.env.model, arm.clips, physics=physics)
    step, model = jax.jit(env.step), env.model
    data = mujoco.MjData(model)
    state = env.reset(2, 3, jax.random.key(0))
    assert np.abs(state.qpos - arm.qpos[2, 3]).max() <= 1e-3 and np.abs(state.qvel).max() <= 1e-3
    data.qpos, data.qvel = state.qpos, state.qvel
    weights, before = arm.config["env_config"]["reward_weights"], 0.0
    for t in range(4):
        action = np.array([0.6 - 0.4 * t], np.float32)
        state, terms, terminated, truncated = step(state, action)
        data.ctrl = action
        for _ in range(2):
            mujoco.mj_step(model, data)
        np.testing.assert_allclose(state.qpos, data.qpos, atol=1e-5)
        np.testing.assert_allclose(state.qvel, data.qvel, atol=1e-4)
        frame = 4 + t
        joint = float(np.square(data.qpos - arm.qpos[2, frame]).sum())
        # body positions lag the joints by one physics step, in MJX as in track-mjx
        hand = float(np.square(data.body("hand").xpos - arm.clips.xpos[2, frame, 2]).sum())
        assert float(terms["joint_reward"]) == pytest.approx(
            np.exp(-weights["joint_reward_exp_scale"] * joint), rel=1e-3
        )
        assert float(terms["endeff_reward"]) == pytest.approx(
            np.exp(-weights["endeff_reward_exp_scale"] * hand), rel=1e-3
        )
        assert float(terms["ctrl_cost"]) == pytest.approx(-0.02 * action[0] ** 2, abs=1e-6)
        assert float(terms["ctrl_diff_cost"]) == pytest.approx(-0.02 * (action[0] - before) ** 2, abs=1e-6)
        force = 5 * action[0]
        assert float(terms["energy_cost"]) == pytest.approx(-0.01 * abs(force * data.qvel[0]), rel=1e-3)
        kinds = [name for name in terms if name.endswith(("_reward", "_cost"))]
        assert float(env.total(terms)) == pytest.approx(sum(float(terms[name]) for name in kinds), abs=1e-6)
        assert not terminated and not truncated and int(state.age) == t + 1
        obs, before = np.asarray(env.get_obs(state)), action[0]
        np.testing.assert_allclose(obs[:5], arm.qpos[2, frame + 1 : frame + 6, 0] - data.qpos[0], atol=1e-5)
        np.testing.assert_allclose(obs[5:8], [data.qpos[0], data.qvel[0], force], atol=1e-4)
        np.testing.assert_allclose(obs[8:11], data.body("hand").xpos, atol=1e-5)
        assert not obs[11:].any()


def test_episodes_end_on_nan_on_a_lost_pose_and_with_the_clip(arm):
    env, zero, step = arm.env, np.zeros(1, np.float32), jax.jit(arm.env.step)
    state = env.reset(0, 0, jax.random.key(0))
    broken, terms, terminated, _ = step(state.replace(qvel=jnp.array([jnp.nan])), zero)
    assert terminated and float(terms["nan"]) == 1 and float(env.total(terms)) == 0
    assert np.isfinite(env.get_obs(broken)).all()
    _, terms, terminated, _ = step(state.replace(qpos=state.qpos + 2), zero)
    assert terminated and float(terms["bad_pose"]) == 1 and float(terms["nan"]) == 0
    late = state.replace(age=jnp.int32(22))
    assert not step(late, zero)[3] and step(late.replace(age=jnp.int32(23)), zero)[3]
    assert env.longest == 24  # frames 0 to 29, five of them ahead


@pytest.mark.parametrize("physics", [pytest.param("mjx", marks=pytest.mark.slow), "mujoco"])
def test_physics_that_blows_up_ends_the_episode(this, arm, physics):
    """A time step far too large for the walker's stiffness: the joint runs away, the episode ends, nothing is NaN."""
    model = mujoco.MjModel.from_xml_string(ARM.replace('damping="0.1"', 'damping="0.1" stiffness="1e9"'))
    config = json.loads(json.dumps(arm.config))
    config["env_config"]["reward_weights"]["bad_pose_dist"] = 1e30  # only NaN may end it
    env = this.env.Imitation(config, model, arm.clips, physics=physics)
    step, zero = jax.jit(env.step), np.zeros(1, np.float32)
    state = env.reset(0, 0, jax.random.key(0))
    for _ in range(22):
        state, terms, terminated, _ = step(state, zero)
        assert np.isfinite(env.get_obs(state)).all()
        assert all(np.isfinite(value) for value in terms.values())
        if terms["nan"]:
            break
    assert terminated and float(terms["nan"]) == 1


def test_frames_are_counted_in_whole_numbers(this, arm):
    """Two control steps per frame, two frames per step, three frames in two steps; 50 s on, none is lost."""
    for hz, expected in ((25, lambda n: n // 2), (100, lambda n: 2 * n), (75, lambda n: 3 * n // 2)):
        config = json.loads(json.dumps(arm.config))
        config["env_config"]["env_args"]["mocap_hz"] = hz
        env = this.env.Imitation(config, arm.env.model, arm.clips)
        frames = [env.frame_index(SimpleNamespace(start=7, age=n)) for n in range(2500)]
        assert frames == [7 + expected(n) for n in range(2500)]


def test_starts_are_of_training_clips_and_leave_room(arm):
    keys, train = jax.random.split(jax.random.key(0), 500), jnp.array([1, 4, 6])
    clip, start = jax.vmap(arm.env.sample_start, (None, 0))(train, keys)
    assert set(clip.tolist()) == {1, 4, 6} and start.min() == 0 and start.max() == 11  # half of 30 - 5 - 1


# --- the student


def test_kl_is_the_closed_form_and_the_sampled_mean(this):
    rng = np.random.default_rng(0)
    m, s, n, r = rng.normal(size=(4, 3))
    exact = this.model.Normal(m, s).kl(this.model.Normal(n, r))
    z = m + np.exp(s / 2) * rng.normal(size=(400_000, 3))
    ratio = -((z - m) ** 2) / np.exp(s) / 2 - s / 2 + (z - n) ** 2 / np.exp(r) / 2 + r / 2
    np.testing.assert_allclose(exact, ratio.mean(0), rtol=0.02)
    np.testing.assert_allclose(this.model.Normal(m, s).kl(this.model.Normal(m, s)), 0, atol=1e-6)


def test_loss_is_written_out(this, arm):
    student, rng = student_of(this, arm), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), student.init(jax.random.key(0)))
    obs, action = rng.normal(size=(6, arm.env.obs_size)).astype(np.float32), rng.uniform(-1, 1, (6, 1))
    batch, key = dict(obs=obs, action=action), jax.random.key(3)
    loss, metrics = jax.jit(student.loss)(params, batch, key, 0.7)

    def layer(x, part, i):
        p = part[f"hidden_{i}"]
        x = x @ p["kernel"] + p["bias"]
        x = x / (1 + np.exp(-x))
        norm = part[f"LayerNorm_{i}"]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]

    def gaussian(x, part):
        h = layer(x, part, 0)
        heads = [h @ part[name]["kernel"] + part[name]["bias"] for name in ("fc2_mean", "fc2_logvar")]
        return heads[0], np.clip(heads[1], -5, 2)

    params = jax.tree.map(np.asarray, params)
    x = (obs - arm.teacher.mean) / arm.teacher.std
    own = x[:, arm.env.reference_size :]
    (m, s), (n, r) = gaussian(x, params["encoder"]), gaussian(own, params["prior"])
    z = m + np.exp(s / 2) * np.asarray(jax.random.normal(key, m.shape))
    last = params["decoder"]["hidden_1"]
    out = np.tanh(layer(np.concatenate([z, own], -1), params["decoder"], 0) @ last["kernel"] + last["bias"])
    error = out - action
    divergence = 0.5 * (np.exp(s - r) + (m - n) ** 2 / np.exp(r) - 1 + r - s).sum(-1).mean()
    assert float(loss) == pytest.approx(np.square(error).mean() + 0.7 * divergence, rel=1e-4)
    assert float(metrics["kl"]) == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_fsq_rounds_to_the_levels_and_its_prior_pays_for_them(this, arm, levels):
    """Every level is reached and no other value; the KL is -log p of the level; gradients pass straight through."""
    values = np.unique(np.asarray(this.model.fsq(jnp.linspace(-6, 6, 500), levels)).round(6))
    np.testing.assert_allclose(values, (np.arange(levels) - levels // 2) / (levels // 2), atol=1e-6)
    assert np.abs(jax.grad(lambda x: this.model.fsq(x, levels).sum())(jnp.linspace(-1, 1, 9))).min() > 0
    logits = np.random.default_rng(0).normal(size=(4, 3, levels))
    index = np.random.default_rng(1).integers(levels, size=(4, 3))
    paid = this.model.Codes(jnp.array(values[index])).kl(this.model.Levels(jnp.array(logits)))
    for row, column in np.ndindex(4, 3):
        p = np.exp(logits[row, column]) / np.exp(logits[row, column]).sum()
        assert float(paid[row, column]) == pytest.approx(-np.log(p[index[row, column]]), rel=1e-4)
    np.testing.assert_allclose(this.model.Levels(jnp.array(logits)).mode(), values[logits.argmax(-1)], atol=1e-6)
    student = student_of(this, arm, fsq_levels=levels)
    batch = dict(obs=np.ones((6, arm.env.obs_size), np.float32), action=np.zeros((6, 1)))
    grads = jax.jit(jax.grad(lambda p: student.loss(p, batch, jax.random.key(0), 1.0)[0]))(
        student.init(jax.random.key(0))
    )
    assert all(np.abs(jax.tree.leaves(grads[part])[0]).max() > 0 for part in ("encoder", "prior", "decoder"))


def test_the_prior_and_the_decoder_do_not_see_the_reference(this, arm):
    student = student_of(this, arm)
    params, obs = student.init(jax.random.key(0)), np.ones((2, arm.env.obs_size), np.float32)
    other = obs.copy()
    other[:, : arm.env.reference_size] += 3
    z = jnp.ones((2, 3))
    np.testing.assert_array_equal(student.prior(params, obs).mean, student.prior(params, other).mean)
    np.testing.assert_array_equal(student.decode(params, obs, z), student.decode(params, other, z))
    assert np.abs(student.posterior(params, obs).mean - student.posterior(params, other).mean).max() > 1e-3
    assert np.abs(student.decode(params, obs, 1e6 * z)).max() <= 1


def test_student_round_trip_and_what_it_refuses(this, arm, tmp_path):
    student = student_of(this, arm)
    params = student.init(jax.random.key(0))
    student.save_pretrained(tmp_path / "a", params)
    again, same = this.model.Student.from_pretrained(tmp_path / "a")
    assert again.config.latent_dim == 3 and again.config.teacher == json.loads(json.dumps(arm.config))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    np.testing.assert_array_equal(again.mean, student.mean)
    with pytest.raises(DataError, match="its latent_dim is 3, but this run has 4"):
        student_of(this, arm, latent_dim=4).load_pretrained(tmp_path / "a")
    np.savez(tmp_path / "a" / "weights.npz", mean=np.array([print], object))
    with pytest.raises(DataError, match="weights.npz"):
        this.model.Student.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "weights.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="weights.npz"):
        this.model.Student.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"latent_dim": -3}')
    with pytest.raises(DataError, match="config.json"):
        this.model.Student.from_pretrained(tmp_path / "a")


def test_weights_of_another_walker_are_refused_and_bring_their_normaliser(this, arm, tmp_path):
    """Same sizes, other joints: refused. Same robot, other teacher: the weights keep the normaliser they know."""
    student, other = student_of(this, arm), student_of(this, arm)
    student.save_pretrained(tmp_path / "a", student.init(jax.random.key(0)))
    other.mean = other.mean + 1
    other.load_pretrained(tmp_path / "a")
    np.testing.assert_array_equal(other.mean, student.mean)
    changed = json.loads(json.dumps(arm.config))
    changed["walker_config"]["joint_names"] = ["knee"]
    with pytest.raises(DataError, match="its joint_names is"):
        student_of(this, arm, teacher=changed).load_pretrained(tmp_path / "a")


@pytest.mark.parametrize("levels", [0, 5])
def test_an_exported_student_acts_the_same_in_numpy(this, arm, tmp_path, levels):
    """OUT/policy.py with its two files beside it: posterior, prior and decoder within 1e-5."""
    student, rng = student_of(this, arm, fsq_levels=levels), np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), student.init(jax.random.key(0)))
    student.save_pretrained(tmp_path / "student", params)
    assert this.export.main(["--checkpoint", str(tmp_path / "student"), "--out", str(tmp_path / "policy")]) == 0
    assert {file.name for file in (tmp_path / "policy").iterdir()} == {"config.json", "weights.npz", "policy.py"}
    (tmp_path / "student" / "notes").write_text("x")
    for words, message in (
        ((tmp_path / "student", tmp_path / "student"), "is or holds other files"),
        ((tmp_path / "student", tmp_path / "student" / "notes"), "is or holds other files"),
        ((tmp_path / "student", arm.folder / "track", "--track-mjx"), "holds a PPONetwork_0 already|FSQ"),
        ((tmp_path, tmp_path / "x"), "holds no config.json; expected .*checkpoints/best"),
    ):
        (arm.folder / "track" / "PPONetwork_0").mkdir(parents=True, exist_ok=True)
        with pytest.raises(DataError, match=message):
            this.export.main(["--checkpoint", *map(str, words[:1]), "--out", *map(str, words[1:])])
    policy = this.policy.Policy(tmp_path / "policy")
    obs = rng.normal(size=(50, arm.env.obs_size)).astype(np.float32)
    own, z = obs[:, arm.env.reference_size :], rng.normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_allclose(policy.decode(own, z), student.decode(params, obs, z), atol=1e-5)
    q, p = student.posterior(params, obs), student.prior(params, obs)
    if levels:
        np.testing.assert_allclose(policy.posterior(obs), q.value, atol=1e-5)
        np.testing.assert_allclose(policy.prior(own), p.logits, atol=1e-5)
    else:
        for ours, (mean, logvar) in ((policy.posterior(obs), q), (policy.prior(own), p)):
            np.testing.assert_allclose(ours[0], mean, atol=1e-5)
            np.testing.assert_allclose(ours[1], np.exp(logvar / 2), atol=1e-5)


def test_a_student_is_a_track_mjx_policy_too(this, arm, tmp_path):
    """Written in track-mjx's layout and read by its rules, it acts as the student's mean; decoder input [z, own]."""
    student = student_of(this, arm)
    params = student.init(jax.random.key(4))
    student.save_pretrained(tmp_path / "student", params)
    words = ["--checkpoint", tmp_path / "student", "--out", tmp_path / "policy", "--track-mjx"]
    assert this.export.main([str(word) for word in words]) == 0
    again = this.checkpoint.read_teacher(tmp_path / "policy" / "PPONetwork_0")
    assert "critic_layer_sizes" in again.config["network_config"]  # track-mjx builds one
    obs = np.random.default_rng(0).normal(size=(9, arm.env.obs_size)).astype(np.float32)
    own, mean = obs[:, arm.env.reference_size :], student.posterior(params, obs).mean
    x = (np.concatenate([obs, own], -1) - again.mean) / again.std
    action, z = this.model.intention(again.params, x, again.reference_size)
    np.testing.assert_allclose(action, student.decode(params, obs, mean), atol=1e-6)
    np.testing.assert_allclose(z, mean, atol=1e-6)


# --- learning


@pytest.mark.parametrize("unroll, envs, batch_size", [(4, 6, 3), (4, 6, 6), (4, 6, 12), (4, 6, 24), (4, 6, 1)])
def test_minibatches_hold_every_sample_once(this, unroll, envs, batch_size):
    t, e = np.meshgrid(np.arange(unroll), np.arange(envs), indexing="ij")
    out = this.distill.minibatches(dict(t=jnp.array(t), e=jnp.array(e)), batch_size, jax.random.key(0))
    updates = this.distill.updates_per_iteration(envs, unroll, batch_size)
    assert out["t"].shape[0] == updates and out["t"][0].size == batch_size
    pairs = list(zip(np.ravel(out["t"]).tolist(), np.ravel(out["e"]).tolist(), strict=True))
    assert sorted(pairs) == [(i, j) for i in range(unroll) for j in range(envs)]
    for row in np.asarray(out["e"]).reshape(updates, -1):
        assert len(set(row)) == min(batch_size, envs)  # as many environments as fit
    assert len({int(x) for x in np.asarray(out["t"])[..., 0].ravel()}) > 1 or batch_size >= envs


def test_schedules(this):
    words = "--data x --teacher t --walker w --steps 100 --warmup 10 --lr 1 --lr-end 0 --kl-weight 1 --kl-start 3"
    now = this.train.schedules(this.train.parse(words.split()), 0, 104)
    assert now["lr"][0] == pytest.approx(0.1) and now["lr"][9] == pytest.approx(1) and not now["lr"][100:].any()
    assert (now["kl"][:51] == 3).all() and (now["kl"][75:] == 1).all() and now["kl"][62] == pytest.approx(2.04)


def test_only_matrices_decay_and_the_gradient_is_clipped(this):
    """AdamW, the learning rate left to the caller: without a gradient a matrix shrinks and a bias stays."""
    opt, params = this.distill.make_optimizer(0.1, 1.0), dict(w=jnp.full((3, 2), 2.0), b=jnp.full(2, 2.0))
    zero = jax.tree.map(jnp.zeros_like, params)
    direction, _ = opt.update(zero, opt.init(params), params)
    np.testing.assert_allclose(direction["w"], 0.2, rtol=1e-6)
    np.testing.assert_array_equal(direction["b"], 0)
    large = jax.tree.map(lambda x: x + 100, zero)
    _, moments = opt.update(large, opt.init(params), params)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(moments[1].mu)))
    assert norm == pytest.approx(0.1, rel=1e-5)  # a norm of 1, once into the mean of decay 0.9


@pytest.fixture(scope="module")
def iterations(this, arm):
    """Three iterations: (start, [(state, metrics)]); environment 0 starts with NaN physics."""
    _, _, mesh = this.train.setup(this.train.parse(words_of(arm, arm.folder / "unused", "--device", "cpu")))
    env, student, opt = arm.env, student_of(this, arm), this.distill.make_optimizer(0.0, 1.0)
    task = dict(reference=env.reference, teacher=arm.teacher.params, mean=arm.teacher.mean, std=arm.teacher.std)
    task |= dict(train=np.flatnonzero(~arm.clips.held_out).astype(np.int32), seed=np.int32(0))
    state = this.distill.init_state(env, student, opt, 8, task, 0)
    state["envs"] = state["envs"].replace(qvel=state["envs"].qvel.at[0].set(jnp.nan))
    first = jax.tree.map(np.array, state)
    task, state = this.distill.replicate(mesh, task), this.distill.shard(mesh, state)
    make = this.distill.make_iteration(env, student, opt, 4, 16)
    run, steps = this.distill.jit(mesh, make, state), []
    for step in range(0, 6, 2):
        now = dict(lr=[1e-2, 0.0 if step == 4 else 1e-2], kl=[1e-3] * 2)
        now = {name: np.array(value, np.float32) for name, value in now.items()}
        state, metrics = run(state, task, np.int32(step), now)
        steps.append((this.distill.gather(state), jax.tree.map(float, metrics)))
    return first, steps


def test_nan_physics_is_reset_and_counted(iterations):
    first, steps = iterations
    assert np.isnan(first["envs"].qvel[0]).all()
    assert steps[0][1]["nan"] == pytest.approx(1 / 32) and steps[1][1]["nan"] == 0
    for state, metrics in steps:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state)) and np.isfinite(metrics["loss"])
    assert steps[0][0]["envs"].age[0] == 3 and steps[0][0]["envs"].age[1] == 4


def test_an_update_past_the_last_step_changes_nothing(iterations):
    """The third iteration has one live update of two: Adam's count says so, and the parameters moved once."""
    counts = [int(state["opt"][1].count) for state, _ in iterations[1]]
    assert counts == [2, 4, 5]


# --- the expert controller


def test_computed_torque_follows_its_reference(this):
    """In C MuJoCo, on the demo's arm: a right controller tracks within a hundredth of a radian."""
    model = mujoco.MjModel.from_xml_string(this.demo.WALKER)
    qpos = this.demo.motion(np.random.default_rng(5))
    data, worst = mujoco.MjData(model), 0.0
    data.qpos, data.qvel = qpos[0] + 0.05, (qpos[1] - qpos[0]) * 50
    for t in range(len(qpos) - 6):
        ahead = qpos[t + 1 : t + 6] - data.qpos
        data.ctrl = this.arm.computed_torque(model, ahead[None], data.qvel[None], data.qpos[None], 0.02)[0]
        for _ in range(4):
            mujoco.mj_step(model, data)
        worst = max(worst, np.abs(data.qpos - qpos[t + 1]).max()) if t > 30 else worst
    assert worst < 0.02


def test_the_clone_learns_from_what_the_controller_visits(this, arm):
    """Observations of whole episodes from rest, and in each the controller's command."""
    obs, action = this.arm.visit(arm.env, arm.clips, 400, np.random.default_rng(0))
    assert obs.shape == (400, arm.env.obs_size) and action.shape == (400, 1)
    assert not obs[:10, 6].any() and np.abs(obs[10:20, 6]).min() > 0  # the first ten are at rest
    expected = this.arm.computed_torque(arm.env.model, obs[:, :5, None], obs[:, 6:7], obs[:, 5:6], 0.02)
    np.testing.assert_allclose(action, expected, atol=1e-3)


def test_motors_are_scaled_to_one(this, tmp_path):
    (tmp_path / "arm.xml").write_text(ARM.replace('ctrlrange="-1 1"', 'ctrlrange="-0.2 0.2" forcerange="-0.2 0.2"'))
    model = mujoco.MjModel.from_xml_string(this.arm.unit_motors(tmp_path / "arm.xml"))
    assert model.actuator_gear[0, 0] == pytest.approx(1.0) and model.actuator_ctrlrange[0].tolist() == [-1, 1]
    data = mujoco.MjData(model)
    data.ctrl = 0.9
    mujoco.mj_forward(model, data)
    assert data.qfrc_actuator[0] == pytest.approx(0.9)  # of 5 * 0.2; the force limit no longer cuts it
    assert model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_CONTACT
    (tmp_path / "arm.xml").write_text(ARM.replace("<motor", "<position").replace("motor>", "position>"))
    with pytest.raises(DataError, match="other than motors"):
        this.arm.unit_motors(tmp_path / "arm.xml")
    (tmp_path / "arm.xml").write_text(ARM[: ARM.index("<actuator")] + "</mujoco>")
    with pytest.raises(DataError, match="1 joints and 0 motors"):
        this.arm.unit_motors(tmp_path / "arm.xml")


# --- the report


def test_interval_covers_the_mean_of_clips(this):
    """Episodes of one clip are alike: a bootstrap over episodes would cover far too rarely."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=20), 5) + 0.1 * rng.normal(size=100)
        low, high = this.metrics.interval(values, np.repeat(np.arange(20), 5), rng, count=300)
        hits += low < 0 < high
    assert 0.85 < hits / 200 < 0.99
    assert this.metrics.interval(np.ones(5), np.zeros(5), rng) is None  # one clip says nothing about others


def test_latent_metrics_count_what_carries_information(this):
    rng = np.random.default_rng(0)
    mean, kl = rng.normal(size=(30, 4, 3)) * [3, 1, 0.01], np.broadcast_to([0.5, 0.02, 0.001], (30, 4, 3))
    alive = (np.arange(30)[:, None] < [30, 10, 30, 30]).astype(float)
    out, clip = dict(latent=mean, kl=kl, alive=alive), np.array([5, 7, 8, 9])
    card, points = this.metrics.latent_metrics(out, np.array([0, 1]), clip, np.tile(np.arange(30)[:, None] / 30, 4))
    assert card["active_dims"] == 2 and card["kl"] == pytest.approx(0.521) and len(points["xy"]) == 40
    assert card["pca_explained_variance"][0] > 0.8 and points["phase"].max() == pytest.approx(29 / 30)
    assert (points["clip"] == 5).sum() == 30 and (points["clip"] == 7).sum() == 10


def test_free_runs_are_those_of_mujoco_and_are_judged_by_the_recorded_range(this, arm):
    """The observation has no reference; an episode lasts while no joint is further out than half the recorded range."""
    start, seen = arm.qpos[:2, 0], []

    def act(obs, t):
        seen.append(np.asarray(obs))
        return np.array([[0.2], [-0.1]])

    qpos = this.metrics.free_run(arm.env, act, start, 3)
    data = mujoco.MjData(arm.env.model)
    data.qpos, data.ctrl = start[1], -0.1
    mujoco.mj_step(arm.env.model, data, 6)
    np.testing.assert_allclose(qpos[2, 1], data.qpos, atol=1e-9)
    size = arm.env.reference_size
    assert not seen[0][:, :size].any() and seen[1].shape == (2, arm.env.obs_size)
    np.testing.assert_allclose(seen[1][:, size], qpos[0, :, 0], atol=1e-6)
    low, high = arm.qpos.min(), arm.qpos.max()
    path = np.array([[low, low], [high + 0.49 * (high - low), high + 0.51 * (high - low)]])[..., None]
    assert this.metrics.lasting(arm.env, arm.clips, path).tolist() == [True, False]
    assert not this.metrics.lasting(arm.env, arm.clips, path * np.nan).any()
    wave = np.sin(3 * np.arange(20_000) / 1000)[:, None, None]
    assert this.metrics.smoothness(arm.env, wave, 1000) == pytest.approx([3 / 2**0.5, 9 / 2**0.5], rel=1e-2)


# --- a new task


def test_steps_to_the_goal_are_counted_from_smoothed_curves(this):
    """80 % of the better kind's final reward, each seed by itself; a seed that never gets there is None."""
    fast, slow = np.tile(np.r_[np.zeros(10), np.ones(40)], (2, 1)), np.tile(np.linspace(0, 0.5, 50), (2, 1))
    found = this.reuse.compare(dict(latent=fast, raw=slow), 100)
    assert found["goal"] == pytest.approx(0.8) and found["kinds"]["raw"]["steps_to_goal"] == [None, None]
    assert found["kinds"]["latent"]["steps_to_goal"] == [1400, 1400]  # four of five updates are at 1 by then


@pytest.mark.slow
def test_a_new_task_pays_for_the_hand_and_hides_the_reference(this, arm):
    """On the target the reward is 1; the ellipse takes two seconds; the policy does not see the reference clip."""
    student = student_of(this, arm)
    task = this.reuse.Task("reach", arm.env, arm.clips, student)
    state = task.reset(jax.random.key(0))
    assert task.horizon == 100 and len(task.get_obs(state)) == task.obs_size
    held = state._replace(target=task.env.simulate(state.arm, jnp.zeros(1)).xpos[arm.env.end[0]])
    _, reward, done = task.step(held, jnp.zeros(1))
    assert float(reward) == pytest.approx(1, abs=1e-5) and not done
    late = state._replace(arm=state.arm.replace(age=jnp.int32(99)))
    assert task.step(late, jnp.zeros(1))[2]
    other = state._replace(arm=state.arm.replace(clip=jnp.int32(3)))
    np.testing.assert_array_equal(task.get_obs(other), task.get_obs(state))
    follow = this.reuse.Task("follow", arm.env, arm.clips, student)
    state = follow.reset(jax.random.key(0))
    np.testing.assert_allclose(follow.target_at(state, 0), follow.target_at(state, 100), atol=1e-5)
    assert np.abs(follow.target_at(state, 0) - follow.target_at(state, 50)).max() > 1e-2


@pytest.mark.slow
def test_reuse_writes_curves_of_both_kinds(this, arm, tmp_path, monkeypatch):
    assert this.train.main(words_of(arm, tmp_path / "run", "--steps", "4")) == 0
    monkeypatch.setattr(this.reuse, "NUM_ENVS", 4)
    monkeypatch.setattr(this.reuse, "UNROLL", 4)
    words = f"--checkpoint {tmp_path}/run/checkpoints/last --env-steps 64 --seeds 2"
    assert this.reuse.main([*words.split(), "--compile-cache", str(arm.folder / "compiled")]) == 0
    found = json.loads((tmp_path / "run/reuse/reach.json").read_text())
    assert np.shape(found["curves"]["latent"]) == np.shape(found["curves"]["raw"]) == (2, 4)
    assert (tmp_path / "run/reuse/reach.png").stat().st_size > 2000


# --- whole runs


def words_of(arm, out, *more):
    sizes = "--num-envs 8 --unroll 4 --batch-size 16 --latent-dim 3 --encoder-hidden-sizes 8 --decoder-hidden-sizes 8"
    sizes += " --prior-hidden-sizes 8 --val-share 0.25 --devices 1 --log-every 2 --warmup 2 --physics mujoco"
    paths = ["--data", *arm.words, "--teacher", arm.folder / "teacher", "--walker", arm.folder / "walker.xml"]
    words = [*paths, *sizes.split(), "--compile-cache", arm.folder / "compiled", "--out", out, *more]
    return [str(word) for word in words]


def losses(out):
    return [(line["step"], line["train/loss"]) for line in log_of(out) if "train/loss" in line]


def assert_same(a, b):
    """Weights, moments, environments and logged losses are equal, bit for bit."""
    for name in ("weights.npz", "resume.npz"):
        one, two = (dict(np.load(out / "checkpoints/last" / name)) for out in (a, b))
        assert sorted(one) == sorted(two)
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)
    assert losses(a) == losses(b)


@pytest.mark.slow
def test_stopped_and_resumed_is_uninterrupted(this, arm, tmp_path, monkeypatch):
    whole = words_of(arm, tmp_path / "whole", "--steps", "14", "--eval-every", "8", "--save-every", "6")
    assert this.train.main(whole) == 0
    part = words_of(arm, tmp_path / "part", "--steps", "14", "--eval-every", "8", "--save-every", "6")
    calls = iter(range(100))
    monkeypatch.setattr(this.train.common.Interrupt, "__call__", lambda self: next(calls) == 2)
    assert this.train.main(part) == 75
    monkeypatch.undo()
    assert this.train.main([*part, "--resume"]) == 0
    assert_same(tmp_path / "whole", tmp_path / "part")
    assert losses(tmp_path / "whole")[-1][0] == 14
    shown = {name for line in log_of(tmp_path / "whole") for name in line}
    assert {"val/arm/reward_share", "val/action_mse", "train/kl", "train/nan"} <= shown
    assert (tmp_path / "whole" / "figures" / "tracking.png").stat().st_size > 2000


@pytest.mark.slow
def test_clips_that_are_added_are_told_and_leave_the_split_alone(this, arm, tmp_path, capsys):
    """The held-out clips of the checkpoint stay, also when another file changes their names; so do copies of them."""
    (tmp_path / "data" / "day1").mkdir(parents=True)
    shutil.copy(arm.folder / "clips.h5", tmp_path / "data" / "day1")
    words = words_of(arm, tmp_path / "run", "--data", tmp_path / "data", "--eval-every", "100")
    assert this.train.main([*words, "--steps", "8", "--val-episodes", "clips/0-2"]) == 0
    (tmp_path / "data" / "day2").mkdir()
    shutil.copy(arm.folder / "clips.h5", tmp_path / "data" / "day2")
    with h5py.File(tmp_path / "data" / "day2" / "clips.h5", "a") as h5:
        half = len(h5["qpos"]) // 2  # those of four clips, in reverse
        for key in ("qpos", "xpos"):
            h5[key][:half] = h5[key][:half][::-1]
    capsys.readouterr()
    assert this.train.main([*words, "--steps", "12", "--resume", "--init", "nowhere"]) == 0
    assert "4 new (trained on), 0 gone" in capsys.readouterr().out
    before, after = (json.loads((tmp_path / f"run/checkpoints/step_{n:07d}/data.json").read_text()) for n in (8, 12))
    assert before["held_out"] == [f"clips/{i}" for i in range(3)] and len(after["clips"]) == 16
    assert after["held_out"] == [f"day1/clips.h5/{i}" for i in range(3)]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--devices", "9"], "--devices 9"),
        (["--devices", "3", "--physics", "mjx"], "multiple of the 3 devices"),
        (["--devices", "2"], "--physics mujoco"),
        (["--batch-size", "12"], "--batch-size"),
        (["--fsq-levels", "1"], "--fsq-levels"),
        (["--val-share", "5"], "--val-share below 1"),
        (["--seed", "99999999999"], "--seed below"),
        (["--prior-hidden-sizes", "0"], "--prior-hidden-sizes must be above 0"),
        (["--compile-cache", "/dev/null/x"], "--compile-cache /dev/null/x: Not a directory"),
        (["--kl-start", "nan"], "--kl-start must not be negative"),
        (["--device", "tpu"], "--device tpu"),
        (["--val-episodes", "nobody"], "--val-episodes nobody"),
        (["--walker", "nowhere.xml"], "no such file"),
        (["--teacher", "nowhere"], "no PPONetwork_<step>"),
        (["--data", "nowhere.h5"], "no such file or folder"),
    ],
)
def test_wrong_flags_end_in_one_line_and_leave_no_run(this, arm, tmp_path, capsys, more, message):
    try:
        this.train.main(words_of(arm, tmp_path / "out", "--steps", "4", *more))
    except DataError as error:
        assert message in str(error)
    except SystemExit as error:
        assert error.code == 2 and message in capsys.readouterr().err
    else:
        raise AssertionError("it ran")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_are_one(arm, tmp_path):
    """torchrun starts two processes of two devices each; their losses and weights are those of one device."""
    env, more = dict(XLA_FLAGS="--xla_force_host_platform_device_count=2"), ["--steps", "8", "--eval-every", "8"]
    script = ROOT / "vae_distill" / "train.py"
    for name, ranks, count in (("one", 1, "1"), ("two", 2, "0")):
        words = words_of(arm, tmp_path / name, *more, "--devices", count, "--device", "cpu", "--physics", "mjx")
        done = launch(script, *words, ranks=ranks, env=env, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    one, two = (np.load(tmp_path / name / "checkpoints/last/weights.npz") for name in ("one", "two"))
    for key in one:
        np.testing.assert_allclose(one[key], two[key], atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_a_cluster_that_asks_for_cuda_where_jax_has_none(arm, tmp_path):
    """JAX_PLATFORMS=cuda ends in one line that names it."""
    words = words_of(arm, tmp_path / "out", "--steps", "4")
    done = launch(ROOT / "vae_distill" / "train.py", *words, env=dict(JAX_PLATFORMS="cuda"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "JAX_PLATFORMS is cuda" in done.stderr and not (tmp_path / "out").exists()


def test_evaluate_refuses_a_device_that_is_not_there(this, arm, tmp_path):
    words = ["--checkpoint", "nowhere", "--out", tmp_path / "out", "--compile-cache", arm.folder / "compiled"]
    with pytest.raises(DataError, match="--device cpu:9: JAX has 4 such devices here"):
        this.evaluate.main([str(word) for word in [*words, "--device", "cpu:9"]])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_evaluate_writes_a_whole_report(this, arm, tmp_path):
    assert this.train.main(words_of(arm, tmp_path / "run", "--steps", "4")) == 0
    words = ["--checkpoint", tmp_path / "run/checkpoints/last", "--episodes", "2"]
    words += ["--seconds", "0.2", "--compile-cache", arm.folder / "compiled", "--batch-size", "6"]
    assert this.evaluate.main([str(word) for word in words]) == 0
    out = tmp_path / "run" / "report"
    found = json.loads((out / "report.json").read_text())
    assert found["held out"]["clips"] + found["train"]["clips"] == 8 == len(found["clips"])
    rows = found["held out"]["rows"]
    assert list(rows) == list(this.metrics.POLICIES) and rows["teacher"]["action_mse"] == 0
    assert rows["teacher"]["reward_share"] == 1 and rows["posterior mean"]["action_mse"] > 0
    for row in rows.values():
        paid = sum(row["terms"].values()) * row["steps"] / found["held out"]["episodes"]
        assert row["reward"] == pytest.approx(paid, rel=1e-3)
    assert found["without a reference"]["random motor commands"]["acceleration"] > 1
    for name in ("tracking", "latent", "interpolation"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 1000
    assert "| teacher |" in (out / "report.md").read_text()
    shutil.copy(arm.folder / "clips.h5", tmp_path / "other.h5")  # known again
    words += ["--data", tmp_path / "other.h5", "--out", tmp_path / "other", "--device", "cpu:1"]
    assert this.evaluate.main([str(word) for word in words]) == 0
    assert jax.config.jax_default_device == jax.devices()[1]
    jax.config.update("jax_default_device", None)
    other = json.loads((tmp_path / "other" / "report.json").read_text())
    assert other["held out"]["clips"] == found["held out"]["clips"] < 8
