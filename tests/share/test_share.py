"""From a run to a model folder and back."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import onetorch as package
from onetorch.runs import algorithm, checkpoint, trust
from onetorch.share import folder, places
from onetorch.share.load import load_model, load_run
from onetorch.share.verify import verify


def test_the_folder_holds_what_the_run_had(base: Path) -> None:
    model, run = base / "model", base / "run"
    assert {p.name for p in model.iterdir()} == {*folder.REQUIRED, folder.GOLDEN, folder.MANIFEST}
    listed = json.loads((model / "manifest.json").read_text())["files"]
    for name, entry in listed.items():
        content = (model / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert (model / "source.py").read_bytes() == Path(__file__).with_name("tiny.py").read_bytes()
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    others = safetensors.torch.load_file(model / "model.safetensors")  # as anybody reads it
    assert others.keys() == newest.model.keys() == {"encode.weight", "decode.weight", "decode.bias"}
    assert all(torch.equal(others[name], newest.model[name]) for name in others)


def test_config_comes_back_exactly_and_the_module_answers_the_same(base: Path) -> None:
    received = load_model(folder.read(places.local(base / "model")), trust.anybody)
    own = load_run(base / "run", trust.anybody)
    assert repr(received.config) == repr(own.config)
    assert received.config.optim.rate.name == "SLOW"
    assert received.config.high == float("inf")
    assert received.config.sizes == (3, 5)
    assert received.config.limit is None
    assert received.config.data == Path("data/none")
    x = torch.randn(5, 16)
    assert torch.equal(received.model(x)["logits"], own.model(x)["logits"])
    assert received.model.decode.weight is received.model.encode.weight
    assert not received.model.training


def test_load_takes_a_run_a_folder_and_a_url(base: Path, run: Path, model: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(model) + "/", "/load/model", recursive=True)
    weights = [
        package.load(where, trust_code=True).state_dict()["encode.weight"] for where in (run, model, str(model), "memory://load/model", f"file://{model}")
    ]
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert weights[0].shape == (16, 16)


def test_card_says_what_was_measured(base: Path) -> None:
    text = (base / "model" / "README.md").read_text()
    result = json.loads((base / "run" / "run.json").read_text())["result"]
    assert text.startswith("---\nlibrary_name: onetorch\nlicense: mit\n")
    assert f"| mean | {result['mean']:.6g} ± {result['mean_ci95']:.6g} (95 % interval) |" in text
    assert "| rows | 32 |" in text
    assert "none.mp4" not in text.partition("## Use")[0]
    assert "272 parameters" in text  # 16 * 16 tied weights and 16 biases
    assert "| optim.rate | \"SLOW\" |" in text
    assert 'onetorch.load("model", trust_code=True)' in text
    assert "One training run (seed 0)" in text


def test_card_of_an_unmeasured_run_without_licence_says_so(run: Path, tmp_path: Path, onetorch) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "stopped", "result": {}}))
    code, out, _ = onetorch("share", run, "plain", "--yes")
    assert code == 0
    assert "no licence" in out
    assert "no results" in out
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "Nothing was measured of these weights." in text
    assert "license" not in text
    assert "None was given." in text
    code, _, err = onetorch("verify", "plain", "--results", "--trust-code")
    assert code == 3
    assert "no results" in err


def test_eval_of_another_checkpoint_is_not_its_result(run: Path, tmp_path: Path, onetorch) -> None:
    assert onetorch("eval", run, "--rows", 8)[0] == 0
    assert onetorch("share", run, "one", "--yes")[0] == 0
    assert "`--rows 8`" in (tmp_path / "one" / "README.md").read_text()
    data = json.loads((run / "eval.json").read_text())
    (run / "eval.json").write_text(json.dumps(data | {"step": 3}))
    assert onetorch("share", run, "two", "--yes")[0] == 0
    assert "by the run, at its end" in (tmp_path / "two" / "README.md").read_text()


def test_a_model_folder_is_evaluated_and_stays_as_it_is(run: Path, model: Path, tmp_path: Path, onetorch) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    code, _, err = onetorch("eval", model, "--rows", 8)
    assert code == 2
    assert "--trust-code" in err  # its source is not onetorch's
    for where in (model, model.as_uri()):
        code, out, err = onetorch("eval", where, "--rows", 8, "--trust-code")
        assert code == 0, err
        assert "written to eval-model/eval.json" in out
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert onetorch("eval", run, "--rows", 8, "--out", "elsewhere")[0] == 0
    found = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("eval-model", "elsewhere")]
    assert found[0]["results"] == found[1]["results"]
    assert found[0]["of"] == model.as_uri()
    assert not (run / "eval.json").exists()
    code, _, err = onetorch("eval", model, "--trust-code", "--row", 8)
    assert (code, "has no option --row (did you mean 'rows'?)" in err) == (2, True)


def test_share_asks_before_it_writes(run: Path, tmp_path: Path, onetorch) -> None:
    code, out, err = onetorch("share", run, "asked")
    assert code == 2
    assert "model.safetensors" in out
    assert "--yes" in err
    assert not (tmp_path / "asked").exists()


def test_share_overwrites_nothing(run: Path, tmp_path: Path, onetorch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    code, _, err = onetorch("share", run, "taken", "--yes")
    assert (code, (tmp_path / "taken" / "mine").read_text()) == (2, "x")
    assert "not empty" in err


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("TOKEN = 'hf_" + "a" * 34 + "'", "a Hugging Face token"),
        ("key = 'AKIA" + "B" * 16 + "'", "an AWS key"),
        ("url = 'https://ada:hunter22@example.org/x'", "a password in a URL"),
        ("path = '/home/ada/data.txt'", "a path in a home folder"),
        ("-----BEGIN " + "OPENSSH PRIVATE KEY-----", "a private key"),
        ("api_key = 'abcdefghijkl123456'", "a password or token"),
    ],
)
def test_share_refuses_secrets_by_file_and_line(line: str, what: str, run: Path, tmp_path: Path, onetorch) -> None:
    code = (run / "source.py").read_text()
    number = code.count("\n") + 1
    (run / "source.py").write_text(code + f"# {line}\n")
    trust.remember((run / "source.py").read_bytes(), "source.py")
    done, _, err = onetorch("share", run, "secret", "--yes")
    assert done == 2
    assert f"source.py:{number}: {what}" in err
    assert line not in err
    assert not (tmp_path / "secret").exists()
    assert onetorch("share", run, "secret", "--yes", "--allow", f"source.py:{number}")[0] == 0


def test_share_to_a_url_and_get_from_it(run: Path, tmp_path: Path, onetorch) -> None:
    assert onetorch("share", run, "memory://shelf/tiny", "--yes")[0] == 0
    code, out, err = onetorch("get", "memory://shelf/tiny", "--trust-code")
    assert (code, err) == (0, "")
    assert "golden outputs agree" in out
    assert (tmp_path / "tiny" / "manifest.json").exists()
    code, _, err = onetorch("share", run, "memory://shelf/tiny", "--yes")
    assert code == 2
    assert "holds a model folder already" in err
    code, _, err = onetorch("get", "memory://shelf/none")
    assert (code, err) == (3, "onetorch: memory://shelf/none/manifest.json is missing\n")


def test_get_leaves_a_checked_copy_of_code_that_it_does_not_run(model: Path, tmp_path: Path, onetorch) -> None:
    code, _, err = onetorch("get", model, "copy")
    assert code == 2
    assert "was not run" in err
    assert folder.read(places.local(tmp_path / "copy")).files.keys() == {*folder.REQUIRED, folder.GOLDEN}


def test_verify_results(model: Path, reseal, onetorch) -> None:
    code, out, _ = onetorch("verify", model, "--results", "--trust-code", "--data", "elsewhere")
    assert code == 0
    code, _, err = onetorch("verify", model, "--results", "--trust-code", "--width", "3")
    assert code == 2
    assert "verify has no option --width" in err
    code, out, _ = onetorch("verify", model, "--results", "--trust-code")
    assert code == 0
    assert "mean" in out
    data = json.loads((model / "provenance.json").read_text())
    values = data["results"]["values"]
    values["mean"] += 3 * values["mean_ci95"]  # beyond sqrt(2) half widths
    (model / "provenance.json").write_text(json.dumps(data))
    reseal(model)
    code, out, err = onetorch("verify", model, "--results", "--trust-code")
    assert code == 3
    assert "DIFFERS" in out
    assert "mean" in err


def test_other_answers_are_refused(model: Path, reseal, onetorch) -> None:
    tensors = safetensors.torch.load_file(model / "golden.safetensors")
    for factor, code in ((1 + 1e-6, 0), (1 + 1e-3, 3)):
        changed = tensors | {"output.logits": tensors["output.logits"] * factor}
        safetensors.torch.save_file(changed, model / "golden.safetensors")
        reseal(model)
        done, _, err = onetorch("verify", model, "--trust-code")
        assert done == code, err
    assert "output.logits differs by" in err


def test_one_changed_byte_is_refused_everywhere(model: Path) -> None:
    contents = {p.name: p.read_bytes() for p in model.iterdir()}
    for name, content in contents.items():
        for at in range(0, len(content), max(1, len(content) // 20) if name != "manifest.json" else 1):
            (model / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(package.runs.errors.CheckpointError, match=name if name != "manifest.json" else "json|safetensors|py|md"):
                verify(folder.read(places.local(model)), trust.anybody)
        (model / name).write_bytes(content)
    verify(folder.read(places.local(model)), trust.anybody)


def test_algorithm_without_example_has_no_golden_outputs(run: Path, onetorch) -> None:
    text = (run / "source.py").read_text()
    (run / "source.py").write_text(text[: text.index("def example")])
    trust.remember((run / "source.py").read_bytes(), "source.py")
    code, out, _ = onetorch("share", run, "bare", "--yes")
    assert code == 0
    assert "no golden outputs" in out
    code, out, _ = onetorch("verify", "bare", "--trust-code")
    assert code == 0
    assert "not checked: the folder holds no golden outputs" in out


def test_a_newer_source_of_ours_is_noted(base: Path, model: Path, reseal, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.json").write_text((model / "config.json").read_text().replace('"source.py"', '"onetorch.rl.tiny"'))
    reseal(model)
    monkeypatch.setattr(algorithm, "builtin", lambda: {"tiny": Path("onetorch/rl/tiny.py")})
    own = algorithm.of_code(Path("tiny.py"), (model / "source.py").read_bytes() + b"# newer\n")
    monkeypatch.setattr(algorithm, "read", lambda name: algorithm.Algorithm(**{**vars(own), "module": "onetorch.rl.tiny"}))
    module = own.load()
    monkeypatch.setattr(algorithm.importlib, "import_module", lambda name: module)
    _, lines = verify(folder.read(places.local(model)))
    assert any("not the version that the sender had" in line for line in lines)


def test_shared_folder_cannot_be_shared_as_a_run(model: Path, onetorch) -> None:
    code, _, err = onetorch("share", model, "again", "--yes")
    assert code == 2
    assert "model folder already" in err


def test_a_killed_share_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onetorch) -> None:
    def full(*args: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "manifest", full)
    code, _, err = onetorch("share", run, "full", "--yes")
    assert code == 3
    assert "disk is full" in err
    assert [p for p in tmp_path.iterdir() if "full" in p.name] == []
    shutil.rmtree(run)
