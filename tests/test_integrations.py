"""What joins frameworks is asked for by name, and says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gam_fast import integrations


@pytest.mark.parametrize("name", integrations.__all__)
def test_a_missing_package_is_named_with_how_to_install_it(name):
    module, packages = integrations._PARTS[name]
    program = (  # without them the package itself can be imported
        f"import sys; sys.modules[{module!r}] = sys.modules['pytorch_lightning'] = None; import gam_fast; "
        f"gam_fast.integrations.{name}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"gam_fast.integrations.{name} needs {module}" in last
    assert f"pip install {packages}" in last


def test_names_are_listed_and_others_are_not_there():
    assert dir(integrations) == ["SharpnessAwareCallback", "SharpnessAwareTrainer", "register_timm"]
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        integrations.Trainer  # noqa: B018
