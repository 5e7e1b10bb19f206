// A job of `ecqx-onnx validate --device folder:PATH`, copied to this device -> result.json and outputs in its folder, to be copied back.
//
//     EcqxJob(model, File(context.getExternalFilesDir(null), "job"), "onnxruntime-android 1.32, Pixel 8").run { Log.i("job", it) }
//
// It reads job.txt, which says the same as job.json in lines of fields between tabs (docs/devices.md of ecqx-onnx).

package ecqx

import java.io.File
import java.nio.ByteBuffer

/** runtime: what ran here, in words, for the report. */
class EcqxJob(private val model: EcqxModel, private val folder: File, private val runtime: String) {
    private class Batch(val inputs: MutableList<List<String>> = ArrayList())

    private val rows = File(folder, "job.txt").readLines().map { it.split('\t') }.filter { it[0].isNotEmpty() && it[0][0] != '#' }

    /** log: told `3/40` after batch 3 of 40. What the runtime throws is the result as well. */
    fun run(log: (String) -> Unit = {}) {
        val fields = linkedMapOf(
            "version" to "1",
            "job" to quoted(rows.first { it[0] == "id" }[1]),
            "runtime" to quoted(runtime),
            "model_sha256" to quoted(model.modelSha256),
            "load_seconds" to (model.loadMilliseconds / 1e3).toString()
        )
        try {
            fields["batches"] = batches(log)
            fields["latency"] = latency()
        } catch (error: Exception) {
            fields.remove("batches")
            fields["error"] = "{\"stage\": \"run\", \"message\": ${quoted(error.message ?: error.toString())}}"
        }
        val partial = File(folder, "result.json.part")
        partial.writeText(fields.entries.joinToString(", ", "{", "}") { "\"${it.key}\": ${it.value}" })
        partial.renameTo(File(folder, "result.json"))
    }

    private fun batches(log: (String) -> Unit): String {
        val batches = ArrayList<Batch>()
        for (row in rows) when (row[0]) {
            "batch" -> batches.add(Batch())
            "input" -> batches.last().inputs.add(row)
        }
        File(folder, "outputs").mkdirs()
        val done = ArrayList<String>()
        for ((number, batch) in batches.withIndex()) {
            val outputs = model.run(batch.inputs.map { load(it) })
            done.add(outputs.withIndex().joinToString(", ", "[", "]") { store("outputs/%05d.%d.bin".format(number, it.index), it.value) })
            log("${number + 1}/${batches.size}")
        }
        return done.joinToString(", ", "[", "]")
    }

    /** Of the one sample in the rows `single`; no float twin runs here, so that the report has no ratio. */
    private fun latency(): String {
        val runs = rows.first { it[0] == "latency_runs" }[1].toInt()
        val inputs = rows.filter { it[0] == "single" }.map { load(it) }
        if (runs == 0) return "null"
        repeat(2) { model.run(inputs) }
        val times = List(runs) {
            val start = System.nanoTime()
            model.run(inputs)
            (System.nanoTime() - start) / 1e9
        }
        return "{\"seconds\": ${times.sorted()[runs / 2]}, \"runs\": $runs}"
    }

    /** row: kind, file, dtype, shape, sha256 */
    private fun load(row: List<String>): Tensor {
        val content = File(folder, row[1]).readBytes()
        if (EcqxModel.sha256(content) != row[4]) throw IllegalStateException("${row[1]} was changed: its sha256 is another")
        return Tensor(row[2], row[3].split('x').filter { it.isNotEmpty() }.map { it.toLong() }.toLongArray(), EcqxModel.filled(content))
    }

    private fun store(name: String, tensor: Tensor): String {
        val data: ByteBuffer = tensor.data
        val content = ByteArray(data.capacity()) { data.get(it) }
        File(folder, name).writeBytes(content)
        val shape = tensor.shape.joinToString(", ", "[", "]")
        return "{\"file\": \"$name\", \"dtype\": \"${tensor.dtype}\", \"shape\": $shape, \"sha256\": \"${EcqxModel.sha256(content)}\"}"
    }

    private fun quoted(text: String): String =
        "\"" + text.map { if (it < ' ' || it == '"' || it == '\\') ' ' else it }.joinToString("") + "\""
}
