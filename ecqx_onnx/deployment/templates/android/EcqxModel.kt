// The model of this folder, checked and used from Kotlin, against ai.onnxruntime (onnxruntime-android, or onnxruntime for the JVM).
//
//     val model = EcqxModel { name -> context.assets.open("model/$name").readBytes() }
//     val checks = model.selfCheck()                      // does this device compute what was computed when the folder was made?
//     val best = model.predict(model.imageToRaw(pixels, width, height)).first()
//
// It reads golden.txt, which says the same as manifest.json in lines of fields between tabs, and needs nothing but onnxruntime.

package ecqx

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.security.MessageDigest
import kotlin.math.abs
import kotlin.math.cos
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.log10
import kotlin.math.max
import kotlin.math.min
import kotlin.math.pow
import kotlin.math.roundToInt
import kotlin.math.sin
import kotlin.math.sqrt

/** Values in C order, little-endian. dtype: numpy's name. */
class Tensor(val dtype: String, val shape: LongArray, val data: ByteBuffer) {
    val count: Int get() = shape.fold(1L) { product, length -> product * length }.toInt()

    operator fun get(i: Int): Double = when (dtype) {
        "float32" -> data.getFloat(4 * i).toDouble()
        "float64" -> data.getDouble(8 * i)
        "int64" -> data.getLong(8 * i).toDouble()
        "int32" -> data.getInt(4 * i).toDouble()
        "int16" -> data.getShort(2 * i).toDouble()
        "int8" -> data.get(i).toDouble()
        else -> (data.get(i).toInt() and 0xff).toDouble()
    }
}

class Check(val name: String, val ok: Boolean, val sentence: String)

class Prediction(val label: String, val probability: Double)

/** read: gives the bytes of a file of the folder, say from the app's assets. */
class EcqxModel(private val read: (String) -> ByteArray) : AutoCloseable {
    private class Case(var raw: List<String>? = null, val inputs: MutableList<List<String>> = ArrayList(), val outputs: MutableList<List<String>> = ArrayList())

    private val rows = String(read("golden.txt"), Charsets.UTF_8).lines().map { it.split('\t') }.filter { it[0].isNotEmpty() && it[0][0] != '#' }
    private val facts = rows.associateBy { it[0] }
    private val inputNames = rows.filter { it[0] == "input" }.map { it[1] }
    private val outputs = rows.filter { it[0] == "output" }
    private val cases = ArrayList<Case>()
    private val modelBytes: ByteArray
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession

    val labels = rows.filter { it[0] == "label" }.map { it.getOrElse(1) { "" } }
    val bytes: Long get() = facts.getValue("model")[2].toLong()
    val float32Bytes: Long get() = facts.getValue("model")[3].toLong()
    val loadMilliseconds: Double
    val modelSha256: String get() = sha256(modelBytes)

    init {
        for (row in rows) when (row[0]) {
            "case" -> cases.add(Case())
            "golden_raw" -> cases.last().raw = row
            "golden_input" -> cases.last().inputs.add(row)
            "golden_output" -> cases.last().outputs.add(row)
        }
        val model = facts.getValue("model")
        modelBytes = read(model[1])
        // A runtime may load damaged weights without a word.
        if (sha256(modelBytes) != model[4]) throw IllegalStateException("${model[1]} was changed: its sha256 is another; deploy it again")
        val start = System.nanoTime()
        val options = OrtSession.SessionOptions()
        options.setIntraOpNumThreads(1)
        session = environment.createSession(modelBytes, options)
        loadMilliseconds = (System.nanoTime() - start) / 1e6
    }

    override fun close() = session.close()

    /** Tensors in the order of the model's inputs -> tensors in the order of its outputs. */
    fun run(inputs: List<Tensor>): List<Tensor> {
        val tensors = inputs.map { OnnxTensor.createTensor(environment, it.data, it.shape, javaType(it.dtype)) }
        try {
            val result = session.run(inputNames.zip(tensors).toMap())
            try {
                val found = HashMap<String, Tensor>()
                for (entry in result) found[entry.key] = tensorOf(entry.value as OnnxTensor)
                return outputs.map { found.getValue(it[1]) }
            } finally {
                result.close()
            }
        } finally {
            tensors.forEach { it.close() }
        }
    }

    /** One raw sample (see imageToRaw, soundToRaw) -> the likeliest classes first. */
    fun predict(raw: Tensor): List<Prediction> {
        val scores = run(listOf(preprocess(raw)))[0]
        val classes = scores.shape.last().toInt()
        val values = DoubleArray(classes) { scores[it] }
        val highest = values.fold(Double.NEGATIVE_INFINITY) { a, b -> max(a, b) }
        val powers = values.map { exp(it - highest) }
        val sum = powers.sum()
        val isShares = values.all { it >= 0 } && abs(values.sum() - 1) < 1e-3
        return values.indices.map { Prediction(labels.getOrElse(it) { _ -> "class $it" }, if (isShares) values[it] else powers[it] / sum) }
            .sortedByDescending { it.probability }
    }

    // ---- the self-check ----

    fun selfCheck(): List<Check> {
        val checks = mutableListOf(guarded("file") { checkFile() })
        val raw = cases.isNotEmpty() && cases[0].raw != null
        if (raw) checks.add(guarded("preprocessing") { checkPreprocessing() })
        checks.add(guarded("outputs") { checkOutputs(false) })
        if (raw) checks.add(guarded("raw to output") { checkOutputs(true) })
        return checks
    }

    /** Median milliseconds of one inference on one thread. */
    fun latencyMilliseconds(runs: Int = 50): Double {
        val inputs = cases[0].inputs.map { load(it) }
        repeat(5) { run(inputs) }
        val times = List(runs) {
            val start = System.nanoTime()
            run(inputs)
            (System.nanoTime() - start) / 1e6
        }
        return times.sorted()[runs / 2]
    }

    private fun guarded(name: String, check: () -> Pair<Boolean, String>): Check = try {
        val (ok, sentence) = check()
        Check(name, ok, sentence)
    } catch (error: Exception) {
        Check(name, false, error.message ?: error.toString())
    }

    private fun checkFile(): Pair<Boolean, String> {
        val same = sha256(modelBytes) == facts.getValue("model")[4]
        return Pair(same, if (same) "the model is the one that was deployed" else "the model was changed: its sha256 is another")
    }

    private fun checkPreprocessing(): Pair<Boolean, String> {
        var worst = 0.0
        for (case in cases) worst = max(worst, difference(preprocess(load(case.raw!!)), load(case.inputs[0])))
        val limit = facts.getValue("preprocessing_tolerance")[1].toDouble()
        return Pair(worst <= limit, "largest difference of inputs $worst, allowed $limit")
    }

    private fun checkOutputs(fromRaw: Boolean): Pair<Boolean, String> {
        val worst = DoubleArray(outputs.size)
        for (case in cases) {
            val inputs = if (fromRaw) listOf(preprocess(load(case.raw!!))) else case.inputs.map { load(it) }
            run(inputs).forEachIndexed { i, found -> worst[i] = max(worst[i], difference(found, load(case.outputs[i]))) }
        }
        val limits = outputs.map { it[if (fromRaw) 3 else 2].toDouble() }
        return Pair(limits.indices.all { worst[it] <= limits[it] }, "largest difference ${worst.joinToString()}, allowed ${limits.joinToString()}")
    }

    /** row: kind, file, dtype, shape, sha256 */
    private fun load(row: List<String>): Tensor {
        val content = read(row[1])
        if (sha256(content) != row[4]) throw IllegalStateException("${row[1]} was changed: its sha256 is another")
        return Tensor(row[2], row[3].split('x').filter { it.isNotEmpty() }.map { it.toLong() }.toLongArray(), filled(content))
    }

    // ---- pictures and sounds -> raw samples ----

    private val rawShape: List<Int> get() = facts.getValue("raw")[1].split('x').map { it.toInt() }
    private val scale: Float get() = facts.getValue("scale")[1].toFloat()

    /** ARGB pixels, as Bitmap.getPixels gives them -> the middle part with the model's aspect, resized with an antialiased triangle filter. */
    fun imageToRaw(pixels: IntArray, width: Int, height: Int): Tensor {
        val (toHeight, toWidth) = rawShape
        val channels = rawShape.getOrElse(2) { 1 }
        var image = IntArray(width * height * channels)
        for (i in 0 until width * height) {
            val (r, g, b) = listOf(pixels[i] shr 16 and 255, pixels[i] shr 8 and 255, pixels[i] and 255)
            if (channels == 1) image[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) shr 16
            else listOf(r, g, b).forEachIndexed { c, value -> image[3 * i + c] = value }
        }
        if (width != toWidth || height != toHeight) {
            val zoom = min(width / toWidth.toDouble(), height / toHeight.toDouble())
            val (left, top) = listOf((width - toWidth * zoom) / 2, (height - toHeight * zoom) / 2)
            image = resizeAxis(image, height, width, channels, weights(width, left, min(width.toDouble(), left + toWidth * zoom), toWidth))
            image = resizeAxis(image, 1, height, toWidth * channels, weights(height, top, min(height.toDouble(), top + toHeight * zoom), toHeight))
        }
        // Data with fewer than 256 levels gets the image's spread over its own.
        if (scale > 1 && scale < 255) for (i in image.indices) image[i] = (image[i] * scale / 255).roundToInt()
        val data = buffer(image.size)
        for (i in image.indices) data.put(i, image[i].toByte())
        return Tensor("uint8", longArrayOf(1, *rawShape.map { it.toLong() }.toLongArray()), data)
    }

    /** 16 bit samples of the model's rate -> cut, or filled with zeros at the end. */
    fun soundToRaw(samples: ShortArray): Tensor {
        val data = buffer(2 * rawShape[0])
        for (i in 0 until min(samples.size, rawShape[0])) data.putShort(2 * i, samples[i])
        return Tensor("int16", longArrayOf(1, rawShape[0].toLong()), data)
    }

    private class Taps(val first: Int, val weights: LongArray)

    private fun weights(size: Int, from: Double, to: Double, target: Int): List<Taps> {
        val start = from.toFloat()
        val step = (to.toFloat() - start).toDouble() / target
        val reach = max(1.0, step)
        return List(target) {
            val centre = start + (it + 0.5) * step
            val first = max(0, (centre - reach + 0.5).toInt())
            val taps = (first until min(size, (centre + reach + 0.5).toInt())).map { x -> max(0.0, 1 - abs((x - centre + 0.5) * (1 / reach))) }
            val sum = taps.sum()
            Taps(first, taps.map { tap -> (0.5 + tap / sum * (1 shl 22)).toLong() }.toLongArray())
        }
    }

    private fun resizeAxis(image: IntArray, outer: Int, length: Int, inner: Int, targets: List<Taps>): IntArray {
        val out = IntArray(outer * targets.size * inner)
        var at = 0
        for (o in 0 until outer) for (target in targets) for (i in 0 until inner) {
            var sum = 1L shl 21
            target.weights.forEachIndexed { t, weight -> sum += image[(o * length + target.first + t) * inner + i] * weight }
            out[at++] = min(255L, max(0L, sum shr 22)).toInt()
        }
        return out
    }

    // ---- raw samples -> the model's input: x = raw / scale; waveforms may become spectra; x = (x - mean) / std ----

    fun preprocess(raw: Tensor): Tensor {
        val kind = facts.getValue("kind")[1]
        if (kind == "indices") {
            val data = buffer(8 * raw.count)
            for (i in 0 until raw.count) data.putLong(8 * i, raw.data.getLong(8 * i))
            return Tensor("int64", raw.shape, data)
        }
        var shape = raw.shape
        var x = FloatArray(raw.count) { raw[it].toFloat() / scale }
        if (kind == "image") {
            val channels = if (shape.size == 4) shape[3].toInt() else 1
            val plane = (shape[1] * shape[2]).toInt()
            val pixels = x
            x = FloatArray(x.size) { i -> pixels[i / (channels * plane) * channels * plane + i % plane * channels + i / plane % channels] }
            shape = longArrayOf(shape[0], channels.toLong(), shape[1], shape[2])
        } else if (kind == "waveform") {
            shape = longArrayOf(shape[0], 1, shape[1])
            facts["spectrum"]?.let {
                val spectrum = Spectrum(it)
                val frames = spectrum.frames(shape[2].toInt())
                x = spectrum.apply(x, shape[0].toInt(), shape[2].toInt())
                shape = longArrayOf(shape[0], 1, frames.toLong(), spectrum.bands.toLong())
            }
        }
        val inner = if (facts.containsKey("spectrum")) 1 else shape.drop(2).fold(1L) { a, b -> a * b }.toInt()
        values("mean")?.let { mean -> for (i in x.indices) x[i] -= mean[if (mean.size == 1) 0 else i / inner % mean.size] }
        values("std")?.let { std -> for (i in x.indices) x[i] /= std[if (std.size == 1) 0 else i / inner % std.size] }
        val data = buffer(4 * x.size)
        for (i in x.indices) data.putFloat(4 * i, x[i])
        return Tensor("float32", shape, data)
    }

    private fun values(name: String): FloatArray? = facts[name]?.drop(1)?.map { it.toDouble().toFloat() }?.toFloatArray()

    private fun tensorOf(value: OnnxTensor): Tensor {
        val content = value.byteBuffer.order(ByteOrder.LITTLE_ENDIAN)
        return Tensor(NAMES.getValue(value.info.type), value.info.shape, content)
    }

    private fun javaType(dtype: String): OnnxJavaType = NAMES.entries.first { it.value == dtype }.key

    internal companion object {
        val NAMES = mapOf(
            OnnxJavaType.FLOAT to "float32", OnnxJavaType.DOUBLE to "float64", OnnxJavaType.INT64 to "int64", OnnxJavaType.INT32 to "int32",
            OnnxJavaType.INT16 to "int16", OnnxJavaType.INT8 to "int8", OnnxJavaType.UINT8 to "uint8", OnnxJavaType.BOOL to "bool"
        )

        fun buffer(size: Int): ByteBuffer = ByteBuffer.allocateDirect(size).order(ByteOrder.LITTLE_ENDIAN)

        /** Position 0, as onnxruntime reads from there. */
        fun filled(content: ByteArray): ByteBuffer {
            val data = buffer(content.size)
            for (i in content.indices) data.put(i, content[i])
            return data
        }

        fun sha256(content: ByteArray): String = MessageDigest.getInstance("SHA-256").digest(content).joinToString("") { "%02x".format(it) }

        /** max |a - b|; infinite for other shapes and types, and for what is no number. */
        fun difference(a: Tensor, b: Tensor): Double {
            if (a.dtype != b.dtype || !a.shape.contentEquals(b.shape)) return Double.POSITIVE_INFINITY
            var worst = 0.0
            for (i in 0 until b.count) {
                val delta = abs(a[i] - b[i])
                worst = if (delta.isNaN()) Double.POSITIVE_INFINITY else max(worst, delta)
            }
            return worst
        }
    }
}

/** Waveforms in [-1, 1] -> log-mel energies or MFCCs, computed in float64. row: "spectrum" and its parameters in order. */
private class Spectrum(row: List<String>) {
    private val rate = row[1].toInt()
    private val frameLength = row[2].toInt()
    private val hop = row[3].toInt()
    private val length = row[4].toInt()
    private val melBands = row[5].toInt()
    private val coefficients = row[6].toInt()
    private val low = row[7].toDouble()
    private val high = row[8].toDouble()
    private val floor = row[9].toDouble()
    private val bins = length / 2 + 1
    private val cosines = DoubleArray(length) { cos(2 * Math.PI * it / length) }
    private val sines = DoubleArray(length) { sin(2 * Math.PI * it / length) }
    private val window = DoubleArray(frameLength) { 0.5 - 0.5 * cos(2 * Math.PI * it / frameLength) }
    val bands = if (coefficients > 0) coefficients else melBands

    fun frames(samples: Int) = 1 + (samples - frameLength) / hop

    fun apply(x: FloatArray, count: Int, samples: Int): FloatArray {
        val frames = frames(samples)
        val filters = filters()
        val out = FloatArray(count * frames * bands)
        var at = 0
        for (i in 0 until count) for (frame in 0 until frames) {
            val part = DoubleArray(frameLength) { x[i * samples + frame * hop + it] * window[it] }
            val power = DoubleArray(bins) { power(part, it) }
            val logs = filters.map { filter ->
                var energy = 0.0
                for (bin in 0 until bins) energy += filter[bin] * power[bin]
                ln(energy + floor)
            }
            for (band in 0 until bands) out[at++] = (if (coefficients > 0) cosine(logs, band) else logs[band]).toFloat()
        }
        return out
    }

    /** Of the frame filled up with zeros to `length`. */
    private fun power(frame: DoubleArray, bin: Int): Double {
        var real = 0.0
        var imaginary = 0.0
        for (t in frame.indices) {
            val turn = (bin.toLong() * t % length).toInt()
            real += frame[t] * cosines[turn]
            imaginary -= frame[t] * sines[turn]
        }
        return real * real + imaginary * imaginary
    }

    private fun cosine(logs: List<Double>, i: Int): Double {
        var sum = 0.0
        for (j in logs.indices) sum += logs[j] * cos(Math.PI * i * (j + 0.5) / melBands)
        return sum * sqrt(2.0 / melBands) * (if (i == 0) sqrt(0.5) else 1.0)
    }

    private fun filters(): List<DoubleArray> {
        fun mel(hertz: Double) = 2595 * log10(1 + hertz / 700)
        fun corner(i: Int) = 700 * (10.0.pow((mel(low) + (mel(high) - mel(low)) * i / (melBands + 1)) / 2595) - 1)
        return List(melBands) { band ->
            val (left, centre, right) = listOf(corner(band), corner(band + 1), corner(band + 2))
            DoubleArray(bins) {
                val hertz = it * (rate.toDouble() / length)
                max(0.0, min((hertz - left) / (centre - left), (right - hertz) / (right - centre)))
            }
        }
    }
}
