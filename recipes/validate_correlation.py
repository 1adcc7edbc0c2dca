"""Can the scores be trusted here? Fine-tunes mixtures for real and correlates: `m2m fidelity`, for `accelerate launch`.

```bash
python recipes/validate_correlation.py --config recipes/demo.yaml
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/validate_correlation.py --config x.yaml
```
"""

import sys

sys.path.pop(0)  # this folder holds a file that would stand in for the standard library's `select`

from m2m_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["fidelity", *sys.argv[1:]]))
