"""The house: what lies where, and who may import whom. Read from the source, lazy imports included."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDERS = ("games", "engines", "support")
METHOD = ("train", "grpo", "classifier_loss", "actor", "rollout", "evaluate", "toy_bandit")


def files():
    """{module name: path} of everything of ours but the tests."""
    found = {name[:-3]: name for name in os.listdir(ROOT) if name.endswith(".py")}
    for folder in FOLDERS:
        found |= {f"{folder}.{name[:-3]}": f"{folder}/{name}" for name in os.listdir(os.path.join(ROOT, folder))
                  if name.endswith(".py") and name != "__init__.py"}
    return found


def read(path):
    with open(os.path.join(ROOT, path)) as file:
        return file.read()


def imports(path):
    """Names of the modules that a file imports anywhere, ours as `folder.module`."""
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in FOLDERS else {node.module}
    return found


def test_what_one_sees_first_is_the_lesson():
    top = [name for name in files() if "." not in name]
    assert len(top) <= 11 and set(METHOD) <= set(top)
    assert len(read("train.py").splitlines()) <= 300
    for folder in FOLDERS:
        assert len(ast.get_docstring(ast.parse(read(f"{folder}/__init__.py"))).splitlines()) >= 3
        assert not any(os.path.isdir(os.path.join(ROOT, folder, name)) and name != "__pycache__"
                       for name in os.listdir(os.path.join(ROOT, folder)))


def test_who_may_import_whom():
    ours = set(files())
    for name, path in files().items():
        found = imports(path)
        mine = {one for one in found if one in ours}
        if name in ("grpo", "classifier_loss", "actor"):
            assert {one.split(".")[0] for one in found} - set(sys.stdlib_module_names) == {"torch"}, name
        if name.startswith("games."):
            assert all(one.startswith("games.") for one in mine), (name, mine)
            assert not any(one.split(".")[0] in ("torch", "transformers") for one in found), name
        if name.startswith("engines."):
            assert mine <= {"actor"} | {one for one in ours if one.startswith("engines.")}, (name, mine)


def test_no_circle_of_imports():
    graph = {name: imports(path) & set(files()) for name, path in files().items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join(path[path.index(name):] + [name])
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            path.pop()
            done.add(name)

    for name in sorted(graph):
        visit(name)
    assert any(graph.values())


@pytest.mark.parametrize("name", METHOD)
def test_method_files_fit_a_screen_s_width(name):
    assert [line for line in read(f"{name}.py").splitlines() if len(line) > 110] == []


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_run_from_any_working_directory(script, tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), "--help"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_the_reading_path_is_short_and_says_why():
    """What the README names as the reading path: each file down to its first ruler, or the definitions named."""
    path = {"grpo.py": None, "classifier_loss.py": None, "actor.py": None, "rollout.py": ("Step", "Episode"),
            "train.py": ("train", "weigh", "gradients")}
    total = 0
    for name, wanted in path.items():
        source = read(name)
        chosen = [source.split("\n# -----")[0]] if wanted is None else [
            ast.get_source_segment(source, node) for node in ast.parse(source).body if getattr(node, "name", "") in wanted]
        assert len(chosen) == len(wanted or [name])
        total += sum(bool(line.strip()) for text in chosen for line in text.splitlines())
    assert 300 < total <= 450, total
    for name in ("train.py", "actor.py"):
        assert comment_lines(read(name)) >= len(read(name).splitlines()) / 3, name


def comment_lines(source):
    """How many lines have a comment or belong to a docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_each_folder_says_what_lives_there():
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse(read(f"{folder}/__init__.py")))
        names = [name for name in os.listdir(os.path.join(ROOT, folder)) if name.endswith(".py") and name != "__init__.py"]
        assert names and [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}", text)] == []


def test_links_in_the_documents_lead_somewhere():
    pages = ["README.md", "EXPERIMENTS.md", "experiments/README.md"] + [f"docs/{n}" for n in os.listdir(os.path.join(ROOT, "docs"))
                                                                       if n.endswith(".md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", read(page)):
            if "://" not in target:
                assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), (page, target)
