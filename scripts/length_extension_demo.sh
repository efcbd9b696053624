#!/usr/bin/env bash
# Shows longer video with the bundled model, from training data to pictures: a LoRA for four times its length, with
# radial attention, on two CPU cores. After a stop the same command resumes.
#   bash scripts/length_extension_demo.sh
#   STEPS=600 CAPTIONS=12 bash scripts/length_extension_demo.sh
#   bash scripts/length_extension_demo.sh --help
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ $# != 0 ]]; then
    sed -n '/^#!/d; s/^# \{0,1\}//p; /^set /q' "${BASH_SOURCE[0]}"
    echo "Set in the environment, by default: WORK=outputs/length_demo VIDEOS=60 STEPS=300 CAPTIONS=6 FRAMES=129 SIDE=64;"
    echo "KEYS and TRAIN_KEYS hold more keys of generation and of training (key=value ...)."
    [[ "$1" == --help || "$1" == -h ]] && exit 0
    echo "error: got '$1', but this script takes no arguments" >&2
    exit 2
fi
work=${WORK:-outputs/length_demo} videos=${VIDEOS:-60} steps=${STEPS:-300} captions=${CAPTIONS:-6}
frames=${FRAMES:-129} side=${SIDE:-64}
read -ra keys <<<"${KEYS:-}" || true
read -ra train_keys <<<"${TRAIN_KEYS:-}" || true
size=("generation.num_frames=$frames" "generation.height=$side" "generation.width=$side" "${keys[@]}")
data=("data.latents=$work/latents_$videos" "data.sizes=${frames}x${side}x${side}")
bash "$root/scripts/setup.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# render videos of four times the trained length, each with its caption
"$root/.venv/bin/python" -P -m scripts.render_toyworld "$work/videos_$videos" --videos "$videos" --frames "$frames" \
    --size "$side"

# encode their latents and text embeddings, once
bash "$root/scripts/prepare_latents.sh" configs/train/wan_tiny_4x.yaml "${data[@]}" "data.folder=$work/videos_$videos"

# train the adapter
bash "$root/scripts/wan_lora_train.sh" configs/train/wan_tiny_4x.yaml "${data[@]}" "${train_keys[@]}" \
    "train.steps=$steps" "output.path=$work/radial_lora"

# make one prompt without it and with it
bash "$root/scripts/wan_t2v_inference.sh" configs/wan_tiny_4x.yaml "${size[@]}" "output.path=$work/without.mp4" \
    output.overwrite=true model.loras=null
bash "$root/scripts/wan_t2v_inference.sh" configs/wan_tiny_4x.yaml "${size[@]}" "output.path=$work/with.mp4" \
    output.overwrite=true "model.loras=$work/radial_lora"

# score videos of a few captions, without it and with it
bash "$root/scripts/length_study.sh" "${size[@]}" "${train_keys[@]}" --videos "$videos" --steps "$steps" \
    --captions "$captions" --only radial radial_lora --work "$work" --out "$work/scores.md"

# put the two videos of the prompt into one picture
"$root/.venv/bin/python" -P -m scripts.contact_sheet "$work/without.mp4" "$work/with.mp4" --scale 2 \
    --out "$work/frames.png"

echo "scores     $work/scores.md"
echo "pictures   $work/frames.png (without the adapter above, with it below), $work/scores_frames.png, $work/scores.png"
