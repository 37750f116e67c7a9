import pytest

from onetorch import recipes
from onetorch.runs import algorithm
from onetorch.runs.errors import UsageError


def test_every_algorithm_is_a_recipe_under_its_own_name_with_its_defaults() -> None:
    known = recipes.known()
    for name in algorithm.builtin():
        source = algorithm.read(name)
        assert known[name].algorithm == name
        assert known[name].make(source.Config) == source.Config()
        assert known[name].doc


@pytest.mark.parametrize("name", recipes.known())
def test_every_recipe_makes_a_config_of_its_algorithm(name: str) -> None:
    found = recipes.find(name)
    Config = algorithm.read(found.algorithm).Config
    assert isinstance(found(Config), Config)
    assert found.doc
    assert "\n" not in found.doc


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"there is no recipe 'pppo' \(did you mean 'ppo'\?\); `onetorch list` shows them"):
        recipes.find("pppo")


def test_a_decorated_function_is_a_recipe() -> None:
    @recipes.recipe("ppo", reaches="475 within a minute")
    def ppo_long_cart(Config: type) -> object:
        """A long one.

        More.
        """
        return Config(total_steps=5)

    assert (ppo_long_cart.name, ppo_long_cart.algorithm, ppo_long_cart.doc) == ("ppo-long-cart", "ppo", "A long one.")
    assert ppo_long_cart(algorithm.read("ppo").Config).total_steps == 5
    assert ppo_long_cart().total_steps == 5  # without the class it imports the algorithm
