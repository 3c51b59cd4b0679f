import ast
from pathlib import Path

import lit_rlhf.functional as functional

FILES = sorted(Path(functional.__file__).parent.glob("*.py"))


def imported_modules(source: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


def test_functional_imports_torch_only():
    assert FILES
    for file in FILES:
        for module in imported_modules(file.read_text()):
            allowed = module.split(".")[0] == "torch" or module.startswith("lit_rlhf.functional.")
            assert allowed, f"{file.name} imports {module}"


def test_the_pinned_names_are_public():
    # design.md, "Names pinned for lit_rlhf.functional"
    pinned = """masked_mean masked_var masked_whiten selective_logprobs entropy_from_logits kl_estimate full_kl gae
    group_advantages leave_one_out_advantages clipped_policy_loss clipped_value_loss preference_loss dpo_loss"""
    assert set(pinned.split()) <= set(functional.__all__)
