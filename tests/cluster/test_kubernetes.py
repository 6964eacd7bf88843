"""cluster/kuberay-job.yaml and cluster/Dockerfile, without Kubernetes or Docker: their form, and that they agree with
this repository."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from mamba.config.cli import parse_train_args

ROOT = Path(__file__).parent.parent.parent
SCHEMA = json.loads((Path(__file__).parent / "kuberay-rayjob.schema.json").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


@pytest.fixture
def documents():
    return list(yaml.safe_load_all((ROOT / "cluster" / "kuberay-job.yaml").read_text()))


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_job_is_of_kuberays_form(documents):
    claim, job = documents
    jsonschema.validate(job, SCHEMA)
    for pod in pods(job):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == volumes
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "ReadWriteMany" in claim["spec"]["accessModes"]


@pytest.mark.parametrize("path", ["spec", "spec.rayClusterSpec", "spec.rayClusterSpec.headGroupSpec.template.spec"])
def test_a_field_that_kuberay_does_not_know_is_refused(documents, path):
    job = copy.deepcopy(documents[1])
    part = job
    for key in path.split("."):
        part = part[key]
    part["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(job, SCHEMA)


def test_the_jobs_command_and_ray_are_this_repositorys(documents):
    spec = documents[1]["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["bash", "cluster/start_or_resume.sh"] and words[3:5] == ["python", "ray_jobs/train.py"]
    config = parse_train_args(words[5:]).config
    assert Path(words[2]) == config.out / config.name / (config.trial or "")
    mounts = [m["mountPath"] for pod in pods(documents[1]) for c in pod["containers"] for m in c["volumeMounts"]]
    assert "/shared" in mounts and config.out.is_relative_to("/shared") and config.data.root.is_relative_to("/shared")


def test_the_dockerfile_copies_what_is_there_and_has_a_python_that_will_do():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    steps = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    allowed = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in allowed, source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= set(copied)
    base = re.fullmatch(r"python:3\.(\d+)-slim", steps[0][1])
    assert base and int(base[1]) >= 11
