"""A server that draws several requests at once with one set of weights: `python examples/server.py`."""

import asyncio
import copy
import io
import threading

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, HTTPException, Request, Response

from tgate_processors import apply_tgate, get_tgate_report

MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
pipe = apply_tgate(DiffusionPipeline.from_pretrained(MODEL, dtype=torch.float16, variant="fp16").to("cuda"))
pipe.set_progress_bar_config(disable=True)
app, places = FastAPI(), asyncio.Semaphore(2)  # the number of pictures drawn at the same time


def draw(cancelled: threading.Event, prompt: str, seed: int, steps: int, plan: str | None) -> tuple[bytes, str]:
    """Draw in a thread; return the picture and the plan that it took."""
    own = copy.copy(pipe)  # shares the weights, and is gated too
    for name, part in pipe.components.items():
        if name.startswith(("scheduler", "tokenizer")):  # these change when they are used
            setattr(own, name, copy.deepcopy(part))
    if plan:
        apply_tgate(own, plan)  # for this request only

    def watch(own, step, timestep, tensors):
        if cancelled.is_set():
            raise ConnectionAbortedError
        return tensors

    call = {"num_inference_steps": steps, "generator": torch.Generator(pipe.device).manual_seed(seed)}
    own(prompt, callback_on_step_end=watch, **call).images[0].save(file := io.BytesIO(), "PNG")
    return file.getvalue(), get_tgate_report(own).levels


@app.get("/picture")
async def picture(request: Request, prompt: str, seed: int = 0, steps: int = 25, plan: str | None = None) -> Response:
    """A picture, with its plan in a header. Drawing stops when the client leaves."""
    cancelled = threading.Event()
    async with places:
        drawing = asyncio.create_task(asyncio.to_thread(draw, cancelled, prompt, seed, steps, plan))
        while not (await asyncio.wait([drawing], timeout=0.1))[0]:
            if await request.is_disconnected():
                cancelled.set()
    try:
        png, levels = drawing.result()
    except ConnectionAbortedError:
        return Response(status_code=499)
    except ValueError as error:  # for example a plan for another number of steps
        raise HTTPException(422, str(error)) from error
    return Response(png, media_type="image/png", headers={"T-GATE-Plan": levels})


if __name__ == "__main__":
    uvicorn.run(app, port=8000)
