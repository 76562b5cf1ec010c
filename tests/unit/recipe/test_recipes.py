"""Recipes: their schema, the shell command they mean, and what the installed host says of them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsv4_plugin.cli import main
from dsv4_plugin.recipe.command import command, model_config, option_words, original_command, shell
from dsv4_plugin.recipe.reader import find_recipe, list_recipes, read_recipe
from dsv4_plugin.recipe.recipe import RecipeError

MINIMAL = {
    "title": "t",
    "model": "deepseek-ai/DeepSeek-V4-Flash",
    "gpu": "MI355X",
    "gpus": 8,
    "host": "sglang==0.5.23",
    "image": "i",
    "arguments": {"tp-size": 8},
    "arms": {"tp": {"concurrency": [1, 8]}},
    "workload": {"isl": 8192, "osl": 1024},
    "accuracy": "none",
    "published": "none",
    "measured": "not measured",
}


@pytest.fixture
def recipe_file(tmp_path):
    def write(**changes):
        path = tmp_path / "mine.yaml"
        path.write_text(
            yaml.safe_dump(
                {key: value for key, value in {**MINIMAL, **changes}.items() if value is not None}
            )
        )
        return path

    return write


SHIPPED = list_recipes()


def test_what_ships():
    names = {recipe.name for recipe in SHIPPED}
    milestones = {
        f"mi355x-pro-{date}"
        for date in ("2026-04-25", "2026-05-02", "2026-05-04", "2026-05-10", "2026-05-21")
    }
    assert milestones < names
    assert {
        "mi355x-pro-tp8-latency",
        "mi355x-pro-tp8-balanced",
        "mi355x-pro-dp8-throughput",
        "mi355x-pro-tp4",
        "mi355x-flash-tp4",
        "mi355x-flash-tp8",
        "mi355x-flash-0731-tp8",
        "mi355x-pro-0813-tp8",
        "mi300x-flash-fp8-tp8",
        "mi325x-pro-fp8-tp8",
        "h200-pro-tp8",
        "cpu-disaggregated",
        "cpu-tiny",
        "mi355x-pro-tp8-mtp",
        "mi355x-pro-disaggregated",
    } < names


@pytest.mark.parametrize(
    "recipe", [r for r in SHIPPED if r.original], ids=lambda recipe: recipe.name
)
def test_milestones_serve_every_published_point_and_name_their_origin(recipe):
    date = recipe.name.removeprefix("mi355x-pro-")
    assert recipe.title.startswith(f"MI355X Pro, milestone {date}")
    for arms in (recipe.arms, recipe.original.arms):
        measured = {(arm.name, concurrency) for arm in arms for concurrency in arm.concurrency}
        assert {(point.layout[:2], point.concurrency) for point in recipe.published} <= measured
    assert all(arm.environment["DSV4_PROFILE"] == date for arm in recipe.arms)
    assert "InferenceX" in recipe.original.source


def test_profiles_of_the_milestones_exist():
    from dsv4_plugin import flags

    for recipe in SHIPPED:
        for arm in recipe.arms:
            flags.check(
                {
                    name: value
                    for name, value in arm.environment.items()
                    if name.startswith(flags.PREFIX)
                }
            )


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_the_shown_command_is_what_a_shell_runs(recipe, capsys, tmp_path):
    """The text is run by a shell in which `dsv4` and `python` print their arguments and
    environment."""
    report = tmp_path / "report"
    for name in ("dsv4", "python"):
        stand_in = tmp_path / name
        stand_in.write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            "json.dump([sys.argv, dict(os.environ)], open(os.environ['REPORT'], 'w'))\n"
        )
        stand_in.chmod(0o755)
    for arm in recipe.arms:
        words = command(recipe, arm)
        text = shell(words, arm.environment)
        subprocess.run(
            ["sh", "-c", text],
            check=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "REPORT": str(report)},
        )
        seen, environment = yaml.safe_load(report.read_text())
        assert [os.path.basename(seen[0]), *seen[1:]] == words
        assert arm.environment.items() <= environment.items()


def test_show_prints_facts_and_command(capsys):
    assert main(["recipe", "show", "mi355x-pro-2026-05-21"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "256: 2256.1 @9.37",
        "not measured",
        "DSV4_PROFILE=2026-05-21",
        "--attn-dp-size 8",
        "gsm8k at least 0.91",
    ):
        assert words in shown
    assert (
        main(
            [
                "recipe",
                "show",
                "mi355x-pro-2026-05-21",
                "--original",
                "--arm",
                "dp",
                "--concurrency",
                "256",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    for words in (
        "SGLANG_HACK_FLASHMLA_BACKEND=triton",
        "--attention-backend compressed",
        "--max-running-requests 256",
        "8c3b5aa",
    ):
        assert words in shown
    assert "# arm tp" not in shown


def test_list_names_every_recipe(capsys):
    assert main(["recipe", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(recipe.name in shown for recipe in SHIPPED)


def test_options():
    arguments = {
        "tp-size": 8,
        "trust-remote-code": True,
        "prefill": ["http://a", "http://b"],
        "max-running-requests": "{concurrency}",
    }
    assert option_words(arguments, 64) == [
        "--tp-size",
        "8",
        "--trust-remote-code",
        "--prefill",
        "http://a",
        "http://b",
        "--max-running-requests",
        "64",
    ]


def test_arms_add_to_the_common_part(recipe_file):
    recipe = read_recipe(
        recipe_file(
            environment={"A": 1},
            arms={
                "x": {
                    "concurrency": [4],
                    "environment": {"B": "two words"},
                    "arguments": {"tp-size": 4},
                }
            },
        )
    )
    arm = recipe.arm(None)
    assert arm.environment == {"A": "1", "B": "two words"}
    assert arm.arguments == {"tp-size": 4}
    assert shlex.split(
        shell(command(recipe, arm, model="/my model"), arm.environment).replace("\\\n", " ")
    ) == ["A=1", "B=two words", "dsv4", "serve", "/my model", "--tp-size", "4"]


def test_original_command_names_the_model():
    recipe = find_recipe("mi355x-pro-2026-04-25")
    words = original_command(recipe, recipe.original.arms[0])
    assert words[:5] == [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        "sgl-project/DeepSeek-V4-Pro-FP8",
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"titel": "x"}, "no field 'titel'; did you mean title"),
        ({"gpus": "eight"}, "gpus is 'eight'; it must be a whole number"),
        ({"gpus": True}, "gpus is True"),
        ({"image": None}, "lacks image"),
        ({"arms": {}}, "arms is empty"),
        ({"arms": {"tp": {"concurrency": [0]}}}, r"concurrency is \[0\]"),
        ({"arms": {"tp": {"concurrency": [1], "role": "boss"}}}, "role is 'boss'"),
        ({"arms": {"tp": {"concurrency": [1], "flags": {}}}}, "arms.tp has no field 'flags'"),
        ({"arguments": {"--tp-size": 8}}, "without its dashes"),
        ({"arguments": {"tp-size": None}}, "tp-size is None"),
        ({"arguments": {"enable-x": False}}, "leave it out"),
        ({"environment": {"A": True}}, "A is True; quote the text"),
        ({"published": {"curve": "2026-01-01"}}, "the shipped ones are 2026-04-25"),
        ({"published": {"points": []}}, "points with their source"),
        (
            {"arms": {"tp": {"concurrency": [1], "not_served": True}}},
            "not_served is True; it must be text",
        ),
        ({"measured": "fast"}, "write 'not measured'"),
        ({"measured": {"commit": "abc"}}, "measured lacks date, machine, points"),
        ({"accuracy": {"task": "gsm8k"}}, "accuracy lacks threshold, source"),
    ],
)
def test_a_wrong_recipe_is_named(recipe_file, changes, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe_file(**changes))


def test_wrong_files_and_names(tmp_path):
    with pytest.raises(RecipeError, match="did you mean mi355x-pro-tp4"):
        find_recipe("mi355x-pro-tp44")
    with pytest.raises(RecipeError, match="nothing.yaml"):
        find_recipe(str(tmp_path / "nothing.yaml"))
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(RecipeError, match="is not a mapping"):
        find_recipe(str(tmp_path / "list.yaml"))
    with pytest.raises(RecipeError, match="has the arms tp, dp; give one with --arm"):
        find_recipe("mi355x-pro-tp4").arm(None)
    with pytest.raises(RecipeError, match="'pp' is none of them"):
        find_recipe("mi355x-pro-tp4").arm("pp")


class TestAgainstTheInstalledHost:
    """`dsv4 recipe check` asks the real SGLang."""

    @pytest.fixture(autouse=True)
    def host(self):
        pytest.importorskip("sglang")

    def test_every_shipped_recipe_passes(self, capsys):
        assert main(["recipe", "check"]) == 0
        shown = capsys.readouterr().out
        assert all(f"{recipe.name}: ok" in shown for recipe in SHIPPED)

    @pytest.mark.thorough
    @pytest.mark.timeout(1800)  # seven seconds an arm where nothing else runs
    def test_every_recipe_with_replicas_passes_where_the_host_sees_an_mi355x(self):
        """The host's branches for ROCm are taken; the arms of the article's points with
        data-parallel attention are among them."""
        names = [
            recipe.name
            for recipe in SHIPPED
            if recipe.gpu == "MI355X"
            and any("attn-dp-size" in arm.arguments for arm in recipe.arms if not arm.not_served)
        ]
        assert sum("-pro-2026-" in name for name in names) == 5
        script = Path(__file__).with_name("pretended_mi355x.py")
        checked = subprocess.run(
            [sys.executable, str(script), *names], capture_output=True, text=True, timeout=1700
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert checked.stdout.splitlines()[0] == "ROCm True gfx95 True"
        assert all(f"{name}: ok\n" in checked.stdout for name in names)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"ep-sice": 8}, "--ep-sice is no option of SGLang 0.5.23; did you mean --ep-size?"),
            (
                {"max-running-request": 8},
                "--max-running-request is an abbreviation of --max-running-requests",
            ),
            (
                {"cuda-graph-max-bs": 8},
                (
                    "--cuda-graph-max-bs is an abbreviation of --cuda-graph-max-bs-decode,"
                    " --cuda-graph-max-bs-prefill"
                ),
            ),
            (
                {"enable-dp-attention": True},
                "--enable-dp-attention is deprecated in SGLang 0.5.23; use --attn-dp-size",
            ),
            ({"disaggregation-mode": "both"}, "invalid choice: 'both'"),
            ({"tp-size": "eight"}, "invalid int value: 'eight'"),
            ({"tp-size": 8, "tensor-parallel-size": 4}, "is given twice"),
            ({"page-size": 64}, "--page-size 64 would become 256"),
            ({"attention-backend": "triton"}, "--attention-backend triton would become dsv4"),
        ],
    )
    def test_an_option_that_the_host_would_not_act_on_is_refused(
        self, recipe_file, capsys, arguments, message
    ):
        assert main(["recipe", "check", str(recipe_file(arguments=arguments))]) == 1
        shown = capsys.readouterr().out
        assert "mine: refused" in shown and message in shown

    @pytest.mark.parametrize(
        "environment, message",
        [
            ({"DSV4_MOEE": "triton"}, "DSV4_MOE"),
            ({"DSV4_MOE": "fastest"}, "DSV4_MOE='fastest'"),
            (
                {"SGLANG_DEFAULT_THINKNG": "1"},
                (
                    "SGLANG_DEFAULT_THINKNG is read neither by SGLang 0.5.23 nor by this plugin;"
                    " did you mean SGLANG_DEFAULT_THINKING?"
                ),
            ),
            ({"MY_SPEED": "1"}, "MY_SPEED is read neither"),
        ],
    )
    def test_a_variable_that_nobody_reads_is_refused(
        self, recipe_file, capsys, environment, message
    ):
        assert main(["recipe", "check", str(recipe_file(environment=environment))]) == 1
        assert message in capsys.readouterr().out

    def test_variables_that_are_read_pass(self, recipe_file):
        # Declared by the host, read by it undeclared, of another program, ours.
        environment = {
            "SGLANG_DEFAULT_THINKING": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
            "AITER_BF16_FP8_MOE_BOUND": "0",
            "DSV4_ROUTE": "auto",
        }
        assert main(["recipe", "check", str(recipe_file(environment=environment))]) == 0

    @pytest.mark.parametrize(
        "recipe", [r for r in SHIPPED if r.original], ids=lambda recipe: recipe.name
    )
    def test_the_side_branch_variables_of_that_day_are_understood_or_explained(self, recipe):
        """A user who still has the branch's exports set gets them mapped, explained or passed to
        the host; none is unknown.

        Some days set two variables that this plugin takes for two choices of one operator, and says
        so.
        """
        from dsv4_plugin.host import arguments

        problems = arguments.environment_problems(recipe.original.environment)
        assert [problem for problem in problems if "contradict each other" not in problem] == []

    def test_an_option_that_serve_lacks_is_refused(self, recipe_file, capsys):
        assert main(["recipe", "check", str(recipe_file(serve=["--gpu"]))]) == 1
        assert "dsv4 serve has no option --gpu" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments, mark, complaint",
        [
            ({"attn-cp-size": 8}, None, "this version refuses to start it (--attn-cp-size"),
            ({"attn-dp-size": 8}, None, None),
            (
                {
                    "speculative-algorithm": "EAGLE",
                    "speculative-num-steps": 3,
                    "speculative-eagle-topk": 1,
                    "speculative-num-draft-tokens": 4,
                },
                None,
                "this version refuses to start it (--speculative-algorithm",
            ),
            (
                {"disaggregation-mode": "prefill", "attn-dp-size": 2, "tp-size": 2},
                None,
                "this version refuses to start it (--disaggregation-mode",
            ),
            ({}, "--attn-cp-size", "this version would start it; remove the mark"),
            (
                {"attn-cp-size": 8},
                "--speculative-algorithm",
                "does not name what is refused: --attn-cp-size",
            ),
            ({"attn-cp-size": 8}, "--attn-cp-size (context parallelism)", None),
            ({}, None, None),
        ],
    )
    def test_a_mark_not_served_is_verified_in_both_directions(
        self, recipe_file, capsys, arguments, mark, complaint
    ):
        arm = {
            "concurrency": [1],
            "arguments": {"tp-size": 8, "trust-remote-code": True, **arguments},
            **({"not_served": mark} if mark else {}),
        }
        assert main(["recipe", "check", str(recipe_file(arms={"tp": arm}))]) == (
            1 if complaint else 0
        )
        shown = capsys.readouterr().out
        assert complaint is None or complaint in shown
        assert (f"not served by this version: {mark}" in shown) == bool(mark)

    def test_a_marked_arm_is_listed_shown_and_not_run(self, recipe_file, capsys, tmp_path):
        path = recipe_file(
            arms={
                "tp": {"concurrency": [1]},
                "cp": {
                    "concurrency": [64],
                    "arguments": {"attn-cp-size": 8},
                    "not_served": "--attn-cp-size (context parallelism)",
                },
            }
        )
        assert main(["recipe", "list", "--dir", str(path.parent)]) == 0
        out = capsys.readouterr().out
        assert "[not served by this version: arm cp: --attn-cp-size (context parallelism)]" in (
            " ".join(out.split())
        )
        assert max(map(len, out.splitlines())) <= 80
        assert main(["recipe", "show", str(path)]) == 0
        assert "# not served by this version: --attn-cp-size" in capsys.readouterr().out
        assert main(["recipe", "run", str(path), "--arm", "cp"]) == 2
        assert (
            "arm cp: not served by this version: --attn-cp-size (context parallelism)"
            in capsys.readouterr().err
        )

    def test_run_refuses_before_it_starts_anything(self, recipe_file, capsys):
        assert main(["recipe", "run", str(recipe_file(arguments={"page-size": 64}))]) == 2
        assert "would become 256" in capsys.readouterr().err

    def test_run_becomes_the_command(self, recipe_file, monkeypatch):
        """By this Python, whatever PATH holds, in the recipe's environment."""
        became = []
        monkeypatch.setattr(os, "execve", lambda *replaced: became.append(replaced))
        main(["recipe", "run", str(recipe_file(environment={"DSV4_MOE": "auto"}))])
        [(program, words, environment)] = became
        assert program == words[0] == sys.executable
        assert words[1:3] == ["-m", "dsv4_plugin"]
        assert words[3:] == ["serve", "deepseek-ai/DeepSeek-V4-Flash", "--tp-size", "8"]
        assert environment == {**os.environ, "DSV4_MOE": "auto"}


@pytest.mark.parametrize(
    "model, entries, dtype",
    [
        ("deepseek-ai/DeepSeek-V4-Pro", 62, "fp4"),
        ("deepseek-ai/DeepSeek-V4-Pro-0813", 64, "fp4"),
        ("deepseek-ai/DeepSeek-V4-Flash-0731", 46, "fp4"),
        ("someone/DeepSeek-V4-Flash-FP8", 44, "fp8"),
    ],
)
def test_a_released_model_is_known_by_its_name(model, entries, dtype):
    import json

    config = json.loads(model_config(model))
    assert (len(config["compress_ratios"]), config["expert_dtype"]) == (entries, dtype)
