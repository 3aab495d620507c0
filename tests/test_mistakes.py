"""A fuzz test from tables: what a user can get wrong, in every script, flag and kind of file.

Each mistake must end in exit code 2 and one line `error: ...` that names the flag, before any slow work, with every file of the
user's as it was. In-process, so that hundreds of them take seconds.
"""
import importlib
import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
import evaluate
import recover
from support import cli
from support.cli import FLAGS, SWITCH, flag_of

MODULES = {"compress": ["--out", "new"], "recover": [], "evaluate": [], "experiments.latency": [], "experiments.choosing": [],
           "experiments.flips": ["--compressor", "gptq"], "experiments.readings": [], "experiments.conjecture": ["dials"],
           "experiments.sweep": ["rates"], "experiments.reproduce": ["table1"], "experiments.patterns": ["--adapter", "run/adapter/idp", "--out", "new"]}


# --- a folder with one good file of every kind -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a run, compressed folders, texts and tasks, made once; the tests run inside copies of it or leave it alone."""
    root = tmp_path_factory.mktemp("world")
    before = os.getcwd()
    os.chdir(root)
    small = ["--limit", "4", "--nsamples", "2", "--seqlen", "16"]
    recover.main(["--method", "idp,lora", "--steps", "2", "--batch-size", "4", "--out", "run", *small])
    for name, more in (("folder", []), ("packed", ["--packed"])):
        compress.main(["--compressor", "rtn", "--bits", "4", "--nsamples", "2", "--seqlen", "16", "--out", name, *more])
    model, tokenizer = compress.load_model("toy")
    model.save_pretrained("dense")
    tokenizer.save_pretrained("dense")
    good = {"context": "The pet of", "choices": ["cat", "dog"], "answer": 0}
    write("good.jsonl", [good] * 7)
    with open("good.txt", "w", encoding="utf-8") as file:
        file.write("Mira Olsen works as a baker . " * 60)
    os.mkfifo("pipe.jsonl")
    write("text.jsonl", [{"text": "Mira"}])
    os.makedirs("full/deep")
    with open("full/notes.txt", "w", encoding="utf-8") as file:
        file.write("mine")
    os.chdir(before)
    return root


def write(name, rows):
    """One JSON object a line; a str stands as it is."""
    with open(name, "w", encoding="utf-8") as file:
        file.write("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def here(world, monkeypatch):
    """Inside the world, where slow work is forbidden and everything must stay as it is."""
    monkeypatch.chdir(world)

    def slow(*args, **kwargs):
        raise AssertionError("slow work began")
    for module, name in ((evaluate, "evaluate_model"), (recover, "train"), (compress, "compress_layer")):
        monkeypatch.setattr(module, name, slow)
    before = snapshot(world)
    yield world
    assert snapshot(world) == before


def snapshot(root):
    """{path: size and time} of everything below a folder."""
    paths = sorted(root.rglob("*"))
    return {str(path.relative_to(root)): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths if not path.is_dir()}


def ends_badly(module, argv, word, capsys):
    """Run a script's main as a shell would; assert one line that holds `word`, exit code 2, and no time lost."""
    start = time.time()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: importlib.import_module(module).main(argv))
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and err.count("\n") == 1, err
    assert word in errors[0], errors[0]
    assert len(errors[0]) < 700 and time.time() - start < 5


# --- 1. every flag of every script, out of range -----------------------------------------------------------------------------

def takes(module):
    """The flags that a script has, from its own --help."""
    import io
    from contextlib import redirect_stdout
    text = io.StringIO()
    with pytest.raises(SystemExit), redirect_stdout(text):
        importlib.import_module(module).parse(["--help"])
    return [name for name in FLAGS if f"{flag_of(name)} " in text.getvalue() and FLAGS[name].kind is not SWITCH]


BAD = {"whole": ["-1", "x", "1.5", "", "nan", "1e3", "99999999999999999999"], "number": ["x", "nan", "inf", "-inf", "", "1e999"],
       "each": ["", "x,", ",", "8,,8", "-1", "nan"], "one of": ["nonsense", ""], "N:M": ["4:2", "2", "0:0", "a:b", ""],
       "not empty": ["", "  "]}
CASES = [(module, flag_of(name), value) for module in MODULES for name in takes(module)
         for kind, values in BAD.items() if FLAGS[name].kind.words.startswith(("a " + kind, kind)) or kind in FLAGS[name].kind.words
         for value in values]


@pytest.mark.parametrize("module", MODULES)
def test_every_flag_out_of_range(module, here, capsys):
    cases = [(flag, value) for name, flag, value in CASES if name == module]
    assert len(cases) >= 30
    for flag, value in cases:
        if flag == "--group-size" and value == "-1" or flag in ("--targets", "--tasks", "--text") and value in ("x", "nan", "-1"):
            continue
        argv = [*MODULES[module], f"{flag}={value}"]
        if flag in MODULES[module]:
            argv = [part for i, part in enumerate(MODULES[module]) if part != flag and MODULES[module][i - 1] != flag] + argv[-1:]
        ends_badly(module, argv, flag, capsys)


# --- 2. names, contradictions, files: (script, what is typed, what the line must hold) ---------------------------------------

TYPED = [
    # names
    ("recover", "--method magic", "--method"), ("recover", "--method prompt,prompt", "--method"), ("recover", "--method idp,", "--method"),
    ("recover", "--compressor zip", "--compressor"), ("recover", "--selector oracle", "--selector"), ("recover", "--device tpu", "--device"),
    ("recover", "--device cuda:99", "--device"), ("recover", "--device cpu:7", "--device"), ("recover", "--dtype int8", "--dtype"),
    ("recover", "--tasks nonsense", "--tasks"), ("recover", "--text nonsense", "--text"), ("recover", "--eval-text nothing.txt", "--eval-text"),
    ("recover", "--model no/such/folder", "--model"), ("recover", "--model /nowhere", "--model"), ("recover", "--model nobody", "--model"),
    ("recover", "--model good.txt", "--model"), ("recover", "--model " + "x" * 300, "--model"),
    ("evaluate", "--model a\udcff", "--model"), ("evaluate", "--compare " + "x" * 300 + " a", "--compare"),
    ("recover", "--model full", "--model"), ("recover", "--model ../..//", "--model"),
    ("experiments.reproduce", "table1 --loss distil", "--loss"), ("experiments.readings", "--loss blah", "--loss"),
    ("experiments.flips", "--compressor rtn", "--compressor"),
    ("experiments.conjecture", "dials --remedies nonsense", "--remedies"), ("experiments.conjecture", "dials --loads 240 --only nonsense", "--only"),
    ("experiments.latency", "--shape llama-8b", "--shape"), ("experiments.choosing", "--tables nonsense", "--tables"),
    ("experiments.choosing", "--tables rules,rules", "--tables"), ("experiments.sweep", "nothing", "sweep"),
    ("experiments.sweep", "compressors --only nonsense", "--only"), ("recover", "--method lora --targets nonsense", "--targets"),
    ("recover", "--method lora --targets q_proj,nonsense", "nonsense"), ("recover", "--method lora --targets lm_head", "lm_head"),
    ("recover", "--nonsense", "--nonsense"), ("recover", "extra", "extra"), ("recover", "--bits", "--bits"),
    ("recover", "--steps 3 --steps 4", "--steps"), ("evaluate", "--adapter a --adapter b", "--adapter"),
    # contradictions: nothing asked is ignored
    ("recover", "--compressor rtn --sparsity 0.5", "--sparsity"), ("recover", "--compressor magnitude --bits 3", "--bits"),
    ("compress", "--out new --compressor gptq --pattern 2:4", "--pattern"), ("recover", "--pattern 2:4 --sparsity 0.5", "--sparsity"),
    ("compress", "--out new --compressor rtn --act-order", "--act-order"), ("compress", "--out new --tasks toy_recall", "--tasks"),
    ("recover", "--method prompt --rank 3", "--rank"), ("recover", "--method lora --prompt-length 3", "--prompt-length"),
    ("recover", "--method idp --merge", "--merge"), ("recover", "--method prompt --selector random", "--selector"),
    ("recover", "--loss nonsense", "--loss"), ("recover", "--loss text --loss distill", "--loss"),
    ("recover", "--model folder --loss distill", "--compressor"), ("recover", "--model folder --method lora,eora", "--method eora"),
    ("recover", "--method eora --alpha 3", "--alpha"), ("recover", "--method eora --loss distill", "--loss"),
    ("recover", "--method eora --steps 3", "--steps"), ("recover", "--method eora --targets lm_head", "--targets"),
    ("experiments.sweep", "sizes --method eora --lr 0.1", "--lr"), ("experiments.sweep", "compressors --loss distill", "--loss"),
    ("experiments.reproduce", "fig2 --loss distill", "--loss"), ("experiments.sweep", "rates --model folder --loss distill", "--compressor"),
    ("recover", "--model folder --bits 3", "--bits"), ("recover", "--model packed --compressor gptq", "--compressor"),
    ("recover", "--model folder --nsamples 3", "--nsamples"), ("compress", "--model folder --out new", "--model"),
    ("experiments.sweep", "compressors --model folder", "--model"), ("experiments.choosing", "--model folder --tasks good.jsonl", "--model"),
    ("experiments.sweep", "compressors --bits 3", "--bits"), ("experiments.sweep", "sizes --rates 0.1", "--rates"),
    ("experiments.sweep", "rates --resume", "--resume"), ("experiments.latency", "--shape llama-7b --model toy", "--model"),
    ("experiments.latency", "--adapter run/adapter", "--adapter"), ("evaluate", "--latency", "--latency"),
    ("evaluate", "--compare run/results.json run/results.json --out new", "--out"), ("recover", "--resume", "--resume"),
    ("evaluate", "--compare run/results.json run/results.json --limit 3", "--limit"),
    ("experiments.choosing", "--batch-size 6", "--batch-size"), ("experiments.choosing", "--m 3", "--m"),
    ("experiments.choosing", "--tasks=", "--tasks"), ("recover", "--batch-size 6 --accumulate 4", "--batch-size"),
    ("recover", "--accumulate 3", "--accumulate"), ("recover", "--eval-context 64", "--eval-context"),
    ("evaluate", "--eval-seqlen 8 --eval-context 9", "--eval-context"), ("compress", "", "--out"),
    # room
    ("recover", "--train-seqlen 600", "--train-seqlen"), ("recover", "--prompt-lengths 300,300 --train-seqlen 300 --batch-size 4", "--train-seqlen"),
    ("recover", "--method prompt --prompt-length 1000000000", "--train-seqlen"), ("recover", "--eval-seqlen 600", "--eval-seqlen"),
    ("compress", "--out new --seqlen 513", "--seqlen"), ("recover", "--seqlen 513", "--seqlen"), ("evaluate", "--eval-seqlen 513", "--eval-seqlen"),
    ("experiments.latency", "--lengths 600", "--lengths"), ("experiments.patterns", "--adapter run/adapter/idp --out new --eval-seqlen 600", "--eval-seqlen"),
    ("recover", "--text text.jsonl", "--text"), ("compress", "--out new --text text.jsonl", "--seqlen"), ("evaluate", "--eval-text text.jsonl", "--eval-text"),
    # --out
    ("recover", "--out full", "--out"), ("evaluate", "--out full", "--out"), ("compress", "--out full", "--out"),
    ("experiments.sweep", "rates --out full", "--out"), ("experiments.choosing", "--out full", "--out"), ("recover", "--out run", "--out"),
    ("compress", "--out folder", "--out"), ("recover", "--out .", "--out"), ("recover", "--out good.txt", "--out"),
    ("recover", "--out good.txt/x", "--out"), ("recover", "--out /", "--out"), ("recover", "--out /proc/x", "--out"),
    ("experiments.latency", "--out full", "--out"), ("recover", "--out run --resume", "--resume"), ("recover", "--out full --resume", "--resume"),
    # --compare
    ("evaluate", "--compare a b", "--compare"), ("evaluate", "--compare run/results.json", "--compare"),
    ("evaluate", "--compare run full", "--compare"), ("evaluate", "--compare run/items.json good.txt", "--compare"),
    # patterns
    ("experiments.patterns", "--adapter run/adapter/idp", "--out"), ("experiments.patterns", "--out new", "--adapter"),
    ("experiments.patterns", "--adapter full --out new", "--adapter"), ("experiments.patterns", "--adapter run/adapter/idp --adapter run/adapter/idp --out new", "--adapter"),
    ("experiments.patterns", "--adapter run/adapter/idp --out new --model smollm2", "--model"),
    # adapters on models that are not theirs
    ("evaluate", "--adapter run/adapter/lora", "--adapter"), ("evaluate", "--adapter run/adapter/idp", "--adapter"),
    ("evaluate", "--adapter run/adapter/idp --model folder", "--adapter"), ("evaluate", "--adapter run", "--adapter"),
    ("evaluate", "--adapter good.txt", "--adapter"), ("evaluate", "--adapter nothing", "--adapter"),
]


@pytest.mark.parametrize("module, typed, word", TYPED, ids=[f"{module} {typed}"[:60] for module, typed, _ in TYPED])
def test_what_is_typed_wrong(module, typed, word, here, capsys):
    ends_badly(module, typed.split(" ") if typed else [], word, capsys)


ROWS = [  # a task file's lines, what the line must hold
    ([], "no rows"), (["", " "], "no rows"), (["[]"], "not an object"), (["{"], "not JSON"), (['{"context": "x"}'], "needs"),
    ([{"context": "x", "choices": [], "answer": 0}], "choices"), ([{"context": "x", "choices": "ab", "answer": 0}], "choices"),
    ([{"context": "x", "choices": ["a", 1], "answer": 0}], "choices"), ([{"context": "x", "choices": ["a"], "answer": 1}], "answer"),
    ([{"context": "x", "choices": ["a", "b"], "answer": True}], "answer"), ([{"context": "x", "choices": ["a"], "answer": -1}], "answer"),
    ([{"context": "x", "choices": ["a"], "answer": "0"}], "answer"), ([{"context": 3, "choices": ["a"], "answer": 0}], "needs"),
    ([{"context": "x", "choices": ["a"], "answer": 0, "suffix": "y"}], "options"),
    ([{"context": "x", "choices": ["a"], "answer": 0, "suffix": 3, "options": ["a"]}], "options"),
    ([{"context": "x", "choices": ["a", "b"], "answer": 0, "suffix": "y", "options": ["a"]}], "options"),
    ([{"context": "x", "target": 3}], "needs"), ([{"context": "x", "target": "a", "aliases": []}], "needs"),
    ([{"context": "x", "target": "a", "aliases": ["a", None]}], "needs"), (['{"context": "\\ud800", "target": "a"}'], "half a character"),
    (['{"context": "x", "target": "a", "weight": NaN}'], "NaN"), (["[" * 50_000], "nested"),
    ([{"context": "x", "choices": ["a"], "answer": 0}, {"context": "x", "target": "a"}], "another kind"),
    ([{"context": "x", "target": "a"}, {"context": "x", "choices": ["a"], "answer": 0}], "another kind")]


@pytest.mark.parametrize("lines, word", ROWS)
def test_broken_task_files(lines, word, here, capsys, tmp_path):
    path = tmp_path / "broken.jsonl"
    write(path, lines)
    ends_badly("evaluate", ["--tasks", str(path)], word, capsys)


@pytest.mark.parametrize("name, raw, word", [
    ("x.txt", b"\xff\xfe\x00", "UTF-8"), ("x.txt", b"", "tokens"), ("x.txt", b"\xef\xbb\xbf", "tokens"), ("x.jsonl", b"{}", '"text"'),
    ("x.jsonl", b'{"text": 3}', '"text"'), ("x.jsonl", b'{"text": "\\ud83d"}', "half a character"), ("x.csv", b"a", "--eval-text"),
    ("x.jsonl", b"\x00", "not JSON")])
def test_broken_texts(name, raw, word, here, capsys, tmp_path):
    (tmp_path / name).write_bytes(raw)
    ends_badly("evaluate", ["--eval-text", str(tmp_path / name)], word, capsys)


@pytest.mark.parametrize("flag", ["--tasks", "--eval-text"])
@pytest.mark.parametrize("path", ["pipe.jsonl", "full", "full/nothing.jsonl"])
def test_files_that_are_none(flag, path, here, capsys):
    ends_badly("evaluate", [flag, path], flag, capsys)


ITEMS = [b"", b"[]", b"{", b'{"a": 3}', b'{"a": {"loss": 3}}', b'{"a": {"loss": {"data": 3, "values": []}}}',
         b'{"a": {"loss": {"data": "x", "values": ["y"]}}}', b'{"a": {"loss": {"data": "x", "values": [NaN]}}}',
         b'{"a": {"t": {"data": "x", "values": [1]}}}', b'{"a": {"t": {"data": "x"}}}', b'{"a": {"t": {"data": "x", "values": []}}}', b"\xff"]


@pytest.mark.parametrize("raw", ITEMS)
def test_broken_items(raw, here, capsys, tmp_path):
    shutil.copy("run/results.json", tmp_path / "results.json")
    (tmp_path / "items.json").write_bytes(raw)
    ends_badly("evaluate", ["--compare", "run/results.json", str(tmp_path / "results.json")], "--compare", capsys)


CONFIG = [({"model_type": "bloom"}, "--model"), ({"model_type": 3}, "--model"), ({"num_hidden_layers": 10 ** 9}, "--model"),
          ({"num_hidden_layers": "4"}, "--model"), ({"hidden_size": -1}, "--model"), ({"vocab_size": 10 ** 12}, "--model"),
          ({"num_attention_heads": 5}, "--model"), ({"hidden_size": 128}, "--model"), ({"num_hidden_layers": 3}, "--model"),
          ({"num_hidden_layers": 5}, "--model"), ({"tie_word_embeddings": False}, "--model"), ({"quantization_config": {"bits": 4}}, "--model")]


@pytest.mark.parametrize("change, word", CONFIG, ids=[json.dumps(change) for change, _ in CONFIG])
def test_broken_model_folders(change, word, here, capsys, tmp_path):
    shutil.copytree("dense", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **change}))
    ends_badly("evaluate", ["--model", str(tmp_path / "m"), "--text", "toy", "--eval-seqlen", "64"], word, capsys)


def broken_weights(path, how):
    """Damage a model's weights file."""
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}    # the file is mapped into memory
    name = sorted(state)[0]
    if how == "missing":
        state.pop(name)
    if how == "extra":
        state["stranger.weight"] = torch.ones(3)
    if how == "integers":
        state[name] = state[name].int()
    if how == "nan":
        state["model.norm.weight"][0] = float("nan")
    if how == "shape":
        state[name] = state[name][:-1].contiguous()
    save_file(state, path, {"format": "pt"})
    if how == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    if how == "pickle":
        torch.save(state, path.with_name("pytorch_model.bin"))
        path.unlink()


@pytest.mark.parametrize("how", ["missing", "extra", "integers", "nan", "shape", "cut", "pickle"])
def test_broken_weights(how, here, capsys, tmp_path):
    shutil.copytree("dense", tmp_path / "m")
    broken_weights(tmp_path / "m/model.safetensors", how)
    ends_badly("recover", ["--model", str(tmp_path / "m"), "--text", "toy", "--seqlen", "64"], "--model", capsys)


COMPRESSION = [b"", b"[]", b"\xff", b"{}", b'{"compressor": 3}', b'{"compressor": "rtn", "settings": []}', b"[" * 50_000]


@pytest.mark.parametrize("raw", COMPRESSION)
def test_broken_compression_reports(raw, here, capsys, tmp_path):
    shutil.copytree("folder", tmp_path / "m")
    (tmp_path / "m/compression.json").write_bytes(raw)
    ends_badly("recover", ["--model", str(tmp_path / "m"), "--text", "toy"], "--model", capsys)


ADAPTER = [("adapter_config.json", b"[]"), ("adapter_config.json", b"{}"), ("adapter_config.json", b'{"peft_type": "IA3"}'),
           ("adapter_config.json", None), ("adapter_model.safetensors", b"x"), ("adapter_model.safetensors", None), ("recipe.json", b"{"),
           ("recipe.json", b"{}"), ("recipe.json", b'{"weights": 3}')]


@pytest.mark.parametrize("name, raw", ADAPTER)
def test_broken_adapters(name, raw, here, capsys, tmp_path):
    shutil.copytree("run/adapter/lora", tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    if raw is not None:
        (tmp_path / "a" / name).write_bytes(raw)
    ends_badly("evaluate", ["--adapter", str(tmp_path / "a")], "--adapter", capsys)


@pytest.mark.parametrize("change", [{"prompts": ["../../x"]}, {"prompts": ["/etc"]}, {"prompts": []}, {"prompts": 3}, {"selector": "magic"},
                                    {"lengths": [1]}, {"prompts": ["prompts/0"] * 2000}])
def test_broken_idp_adapters(change, here, capsys, tmp_path):
    shutil.copytree("run/adapter/idp", tmp_path / "a")
    config = json.loads((tmp_path / "a/idp_config.json").read_text())
    (tmp_path / "a/idp_config.json").write_text(json.dumps({**config, **change}))
    ends_badly("evaluate", ["--adapter", str(tmp_path / "a")], "--adapter", capsys)


def test_how_many_mistakes_there_are():
    """The number that README and the notes quote."""
    tables = (CASES, TYPED, ROWS, ITEMS, CONFIG, COMPRESSION, ADAPTER)
    assert sum(map(len, tables)) >= 500
