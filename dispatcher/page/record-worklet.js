// Runs in the browser's audio thread: gathers what the microphone hears and hands over 100 ms at a time as s16.

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.samples = new Int16Array(Math.round(sampleRate / 10));
    this.filled = 0;
    this.loudest = 0;
    this.port.onmessage = () => {
      this.#send();
      this.port.postMessage({ last: true });
    };
  }

  process(inputs) {
    const input = inputs[0]?.[0];
    if (!input) return true;
    for (const value of input) {
      const held = Math.max(-1, Math.min(1, value));
      this.loudest = Math.max(this.loudest, Math.abs(held));
      this.samples[this.filled++] = Math.round(held * 32767);
      if (this.filled === this.samples.length) this.#send();
    }
    return true;
  }

  #send() {
    if (!this.filled) return;
    const pcm = this.samples.slice(0, this.filled).buffer;
    this.port.postMessage({ pcm, loudest: this.loudest }, [pcm]);
    this.filled = 0;
    this.loudest = 0;
  }
}

registerProcessor("voxfleet-recorder", Recorder);
