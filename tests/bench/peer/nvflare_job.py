"""NVFLARE's simulator with its FedAvg recipe: one process for each site.

python nvflare_job.py SITES ROUNDS WIDTH WORKSPACE
"""

from __future__ import annotations

import sys

from network import PlainCNN
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv


def main() -> None:
    """Run the job to its end."""
    sites, rounds, width = (int(argument) for argument in sys.argv[1:4])
    recipe = FedAvgRecipe(
        name="bench", min_clients=sites, num_rounds=rounds, model=PlainCNN(width), train_script="nvflare_client.py"
    )
    recipe.execute(SimEnv(num_clients=sites, num_threads=sites, workspace_root=sys.argv[4]))


if __name__ == "__main__":
    main()
