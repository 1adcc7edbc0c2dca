"""Chooses the mixture to fine-tune on, and fine-tunes on it: `m2m select`, for `accelerate launch`.

```bash
python recipes/select.py --config recipes/demo.yaml
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/select.py --config x.yaml --max_steps 100
```
"""

import sys

# Python puts a script's own folder first on its path, where this file would stand in for the standard library's `select`.
sys.path.pop(0)

from m2m_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
